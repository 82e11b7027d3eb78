"""What Switch Transformers and T5 share in a Hugging Face folder: rules and config fields."""

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.config import EncDecConfig
from moejax.convert.hf_config import Fields
from moejax.convert.rules import Rule
from moejax.errors import UserError

# T5 v1.0 files carry this one; the model never used it.
IGNORED = (r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight',)
# Hugging Face field -> ours, of the plain ones.
PLAIN: Mapping[str, str] = {
    'vocab_size': 'vocab_size', 'd_model': 'd_model', 'd_kv': 'd_kv', 'd_ff': 'd_ff',
    'num_heads': 'num_heads', 'num_layers': 'num_layers',
    'relative_attention_num_buckets': 'relative_attention_num_buckets',
    'relative_attention_max_distance': 'relative_attention_max_distance',
    'layer_norm_epsilon': 'norm_eps', 'dropout_rate': 'dropout_rate',
    'initializer_factor': 'initializer_factor',
}
# Names that configurations of Hugging Face give to the same fields.
_SYNONYMS = {
    'hidden_size': 'd_model', 'num_attention_heads': 'num_heads', 'num_hidden_layers': 'num_layers',
    'head_dim': 'd_kv',
}


def plain_fields(fields: Fields, defaults: Mapping[str, Any]) -> dict[str, Any]:
  """The fields that only change their name, and the special tokens."""
  fields.rename(_SYNONYMS)
  fields.require('is_encoder_decoder', True)
  fields.require('is_decoder', False)
  kwargs = {}
  for theirs, ours in PLAIN.items():
    default = defaults[theirs]
    kinds = (int,) if isinstance(default, int) else (int, float)
    kwargs[ours] = fields.take(theirs, default, *kinds)
  for ours in ('norm_eps', 'dropout_rate', 'initializer_factor'):
    kwargs[ours] = float(kwargs[ours])
  kwargs['num_decoder_layers'] = fields.take(
      'num_decoder_layers', defaults['num_decoder_layers'], int, type(None)
  )
  if kwargs['num_decoder_layers'] is None:
    kwargs['num_decoder_layers'] = kwargs['num_layers']
  pad = fields.take('pad_token_id', 0, int, type(None))
  kwargs['pad_id'] = 0 if pad is None else pad
  eos = fields.take('eos_token_id', 1, int, list, type(None))
  if isinstance(eos, list) and len(eos) != 1:
    raise UserError(f'{fields.where}: eos_token_id = {eos!r}: T5 has one end-of-sequence id')
  eos = eos[0] if isinstance(eos, list) else eos
  kwargs['eos_id'] = 1 if eos is None else eos
  start = fields.take('decoder_start_token_id', None, int, type(None))
  kwargs['decoder_start_id'] = kwargs['pad_id'] if start is None else start
  return kwargs


def plain_values(config: EncDecConfig) -> dict[str, Any]:
  """Our plain settings under their Hugging Face names."""
  return {
      **{theirs: getattr(config, ours) for theirs, ours in PLAIN.items()},
      'num_decoder_layers': config.num_decoder_layers, 'pad_token_id': config.pad_id,
      'eos_token_id': config.eos_id, 'decoder_start_token_id': config.decoder_start_id,
      'is_encoder_decoder': True,
  }


def sizes(config: EncDecConfig) -> dict[str, int]:
  """Axis letters to sizes. `b` counts relative-position buckets here."""
  return {
      'v': config.vocab_size, 'd': config.d_model, 'n': config.num_heads, 'h': config.d_kv,
      'f': config.d_ff, 'b': config.relative_attention_num_buckets,
      'e': config.moe.num_experts if config.moe else 0,
  }


def layers(config: EncDecConfig) -> dict[str, Sequence[int]]:
  """The layer sets that rules run over: all, dense and sparse ones of each stack."""
  sets: dict[str, Sequence[int]] = {}
  for stack, n in (('encoder', config.num_layers), ('decoder', config.num_decoder_layers)):
    sparse = config.sparse_layers(stack)
    sets[stack] = range(n)
    sets[f'{stack}_sparse'] = sparse
    sets[f'{stack}_dense'] = [i for i in range(n) if i not in sparse]
  return sets


def _attention(stack: str, index: int, theirs: str, ours: str) -> list[Rule]:
  their, our = f'{stack}.block.{{i}}.layer.{index}', f'{stack}/layers_{{i}}/{ours}'
  inputs = [
      Rule(f'{their}.{theirs}.{x}.weight', f'{our}/{x}', '(n h) d -> d n h', stack) for x in 'qkv'
  ]
  return [
      *inputs,
      Rule(f'{their}.{theirs}.o.weight', f'{our}/o', 'd (n h) -> n h d', stack),
      Rule(f'{their}.layer_norm.weight', f'{our}/norm', 'd -> d', stack),
  ]


def ffn_index(stack: str) -> int:
  """Where a block keeps its FFN: after self-attention, and cross-attention in the decoder."""
  return 1 if stack == 'encoder' else 2


def rules(
    config: EncDecConfig, *, untied_copies: bool = False, head: str = 'lm_head.weight'
) -> list[Rule]:
  """Everything but the FFNs.

  untied_copies: files of an untied model hold the stacks' embeddings too. head: the tensor that is
  the untied head, which may be the embedding once more.
  """
  stacks = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')
  tied = config.tie_embeddings
  rows = [
      Rule(
          'shared.weight', 'shared/embedding', 'v d -> v d',
          copies=(*stacks, 'lm_head.weight') if tied else stacks,
          write_copies=untied_copies and not tied,
      )
  ]
  if not tied:
    rows.append(Rule(head, 'lm_head/kernel', 'v d -> d v', shares=head == 'shared.weight'))
  for stack in ('encoder', 'decoder'):
    first = f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
    rows += [
        Rule(first, f'{stack}/relative_bias', 'b n -> b n'),
        Rule(f'{stack}.final_layer_norm.weight', f'{stack}/final_norm', 'd -> d'),
        Rule(
            f'{stack}.block.{{i}}.layer.{ffn_index(stack)}.layer_norm.weight',
            f'{stack}/layers_{{i}}/ffn/norm', 'd -> d', stack,
        ),
    ]
  rows += _attention('encoder', 0, 'SelfAttention', 'attention')
  rows += _attention('decoder', 0, 'SelfAttention', 'self_attention')
  rows += _attention('decoder', 1, 'EncDecAttention', 'cross_attention')
  return rows


def matrices(theirs: str, ours: str, gated: bool, stack: str, prefix: str = '') -> list[Rule]:
  """The matrices of an FFN. Gated files call the gate wi_0 and the linear half wi_1.

  theirs: ordered names the module has had, the one to write first, separated by '|'.
  prefix: 'e ' for a stack of experts.
  """
  names = {'gate': 'wi_0', 'wi': 'wi_1', 'wo': 'wo'} if gated else {'wi': 'wi', 'wo': 'wo'}
  written, *aliases = theirs.split('|')
  return [
      Rule(
          f'{written}.{their}.weight', f'{ours}/{our}',
          f'{"d f" if our == "wo" else "f d"} -> {prefix}{"f d" if our == "wo" else "d f"}',
          stack, aliases=tuple(f'{alias}.{their}.weight' for alias in aliases),
      )
      for our, their in names.items()
  ]
