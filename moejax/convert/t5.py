"""T5 v1.0 (ReLU, tied) and v1.1 (gated GELU, untied; arXiv 1910.10683) as Hugging Face has them."""

from typing import Any

from moejax.config import EncDecConfig
from moejax.convert import encdec, hf_config
from moejax.convert.family import Family, Files
from moejax.convert.rules import Rule
from moejax.errors import UserError

DEFAULTS = {
    'vocab_size': 32128, 'd_model': 512, 'd_kv': 64, 'd_ff': 2048, 'num_layers': 6,
    'num_decoder_layers': None, 'num_heads': 8, 'relative_attention_num_buckets': 32,
    'relative_attention_max_distance': 128, 'layer_norm_epsilon': 1e-6, 'dropout_rate': 0.1,
    'initializer_factor': 1.0,
}


def read_config(fields: hf_config.Fields) -> EncDecConfig:
  """Our config from Hugging Face's.

  `feed_forward_proj` is 'relu' or 'gated-gelu' (which means gelu_new); `dense_act_fn` and
  `is_gated_act` overrule it where present. Tied or not is decided as transformers does it:
  `scale_decoder_outputs` where present, else `tie_word_embeddings`.
  """
  plain = encdec.plain_fields(fields, DEFAULTS)
  projection = fields.take('feed_forward_proj', 'relu', str)
  first, _, last = projection.rpartition('-')
  if first not in ('', 'gated'):
    raise UserError(
        f"{fields.where}: feed_forward_proj = {projection!r}: expected 'relu' or 'gated-gelu'"
    )
  derived = 'gelu_new' if projection == 'gated-gelu' else last
  activation = fields.activation(fields.take('dense_act_fn', derived, str))
  gated = fields.take('is_gated_act', first == 'gated', bool)
  tie = fields.take('tie_word_embeddings', True, bool)
  tied = fields.take('scale_decoder_outputs', tie, bool)
  return EncDecConfig(
      family='t5', activation=activation, gated=gated, tie_embeddings=tied, moe=None, **plain
  )


def write_config(config: EncDecConfig) -> dict[str, Any]:
  """The inverse of `read_config`."""
  name = 'gelu' if config.gated and config.activation == 'gelu_new' else config.activation
  return {
      **encdec.plain_values(config),
      'feed_forward_proj': f'gated-{name}' if config.gated else name,
      'dense_act_fn': config.activation, 'is_gated_act': config.gated,
      'tie_word_embeddings': config.tie_embeddings,
      'scale_decoder_outputs': config.tie_embeddings,
  }


def rules(config: EncDecConfig, files: Files | None = None) -> list[Rule]:
  """Every tensor of a T5.

  transformers 5 may save a v1.1 model whose head is its embedding, and leave the head out.
  """
  head = 'lm_head.weight'
  if files is not None and head not in files.names and files.values.get('tie_word_embeddings'):
    head = 'shared.weight'
  rows = encdec.rules(config, head=head)
  for stack in ('encoder', 'decoder'):
    layer = f'{stack}.block.{{i}}.layer.{encdec.ffn_index(stack)}'
    names = f'{layer}.DenseReluDense|{layer}.mlp'
    rows += encdec.matrices(names, f'{stack}/layers_{{i}}/ffn', config.gated, f'{stack}_dense')
  return rows


FAMILY = Family(
    name='t5', model_types=('t5',), architecture='T5ForConditionalGeneration',
    read_config=read_config, write_config=write_config, rules=rules, sizes=encdec.sizes,
    layers=encdec.layers, ignored=encdec.IGNORED,
)
