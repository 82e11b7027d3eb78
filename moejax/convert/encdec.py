"""What Switch Transformers and T5 share in a Hugging Face folder: rules and config fields."""

from collections.abc import Sequence

from moejax.config import EncDecConfig
from moejax.convert.rules import Rule

# T5 v1.0 files carry this one; the model never used it.
IGNORED = (r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight',)


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
