"""Switch Transformers (arXiv 2101.03961) as Hugging Face stores them."""

from typing import Any

from moejax.config import EncDecConfig, EncDecMoeConfig
from moejax.convert import encdec, hf_config
from moejax.convert.family import Family, Files
from moejax.convert.rules import Rule
from moejax.errors import UserError

DEFAULTS = {
    'vocab_size': 32128, 'd_model': 768, 'd_kv': 64, 'd_ff': 2048, 'num_layers': 12,
    'num_decoder_layers': 12, 'num_heads': 12, 'relative_attention_num_buckets': 32,
    'relative_attention_max_distance': 128, 'layer_norm_epsilon': 1e-6, 'dropout_rate': 0.1,
    'initializer_factor': 1.0,
}
# Hugging Face always has a capacity; this one stands for none.
NO_CAPACITY = 2**31 - 1


def sparse_step(layers: int, num_sparse: int) -> int:
  """The step transformers derives from a number of sparse layers.

  Layer i is sparse if i % step == 1, or the step is 1.
  No sparse layer asked for gives step = layers, which makes layer 1 sparse all the same (every
  layer, if there is but one). More than there are layers gives 0: none is sparse.
  """
  return layers // num_sparse if num_sparse > 0 else layers


def num_sparse_for(layers: int, step: int, actual: int) -> int:
  """A number of sparse layers from which transformers derives this step, else the actual one."""
  if step == 0:
    return layers + 1
  candidates = (n for n in range(1, layers + 1) if sparse_step(layers, n) == step)
  return next(candidates, actual)


def read_config(fields: hf_config.Fields) -> EncDecConfig:
  """Our config from Hugging Face's; explicit sparse steps overrule the numbers of sparse layers."""
  plain = encdec.plain_fields(fields, DEFAULTS)
  steps = {}
  for stack, layers in (
      ('encoder', plain['num_layers']), ('decoder', plain['num_decoder_layers'])
  ):
    number = fields.take(f'num_sparse_{stack}_layers', 3, int)
    step = fields.take(f'{stack}_sparse_step', sparse_step(layers, number), int)
    steps[f'{stack}_sparse_step'] = max(step, 0)
  capacity = fields.take('expert_capacity', 64, int)
  gated = fields.take('is_gated_act', False, bool)
  fields.take('feed_forward_proj', None, str, type(None))
  activation = fields.activation(fields.take('dense_act_fn', 'relu', str))
  tied = fields.take('tie_word_embeddings', True, bool)
  moe = EncDecMoeConfig(
      num_experts=fields.take('num_experts', 8, int),
      router_bias=fields.take('router_bias', False, bool),
      router_jitter_noise=float(fields.take('router_jitter_noise', 0.01, int, float)),
      expert_capacity=None if capacity >= NO_CAPACITY else capacity,
      router_z_loss_coef=float(fields.take('router_z_loss_coef', 0.001, int, float)),
      router_aux_loss_coef=float(fields.take('router_aux_loss_coef', 0.001, int, float)),
      router_ignore_padding_tokens=fields.take('router_ignore_padding_tokens', False, bool),
      **steps,
  )
  return EncDecConfig(
      family='switch', activation=activation, gated=gated, tie_embeddings=tied, moe=moe, **plain
  )


def write_config(config: EncDecConfig) -> dict[str, Any]:
  """The inverse of `read_config`. Gated models raise UserError: transformers cannot run them."""
  if config.gated:
    raise UserError(
        'model.gated = true: transformers has no gated Switch Transformer: keep the moejax format'
    )
  if config.moe is not None and config.moe.d_ff not in (None, config.d_ff):
    raise UserError(
        f'moe.d_ff = {config.moe.d_ff}: transformers gives the experts of a Switch Transformer the '
        f'width of its dense layers, {config.d_ff}: keep the moejax format'
    )
  moe = config.moe or EncDecMoeConfig(num_experts=1, encoder_sparse_step=0, decoder_sparse_step=0)
  values = encdec.plain_values(config)
  for stack, layers, step in (
      ('encoder', config.num_layers, moe.encoder_sparse_step),
      ('decoder', config.num_decoder_layers, moe.decoder_sparse_step),
  ):
    actual = len(config.sparse_layers(stack))
    values[f'num_sparse_{stack}_layers'] = num_sparse_for(layers, step, actual)
    values[f'{stack}_sparse_step'] = step
  return {
      **values,
      'num_experts': moe.num_experts,
      'expert_capacity': moe.expert_capacity or NO_CAPACITY,
      'router_bias': moe.router_bias, 'router_jitter_noise': moe.router_jitter_noise,
      'router_dtype': 'float32', 'router_z_loss_coef': moe.router_z_loss_coef,
      'router_aux_loss_coef': moe.router_aux_loss_coef,
      'router_ignore_padding_tokens': moe.router_ignore_padding_tokens,
      'dense_act_fn': config.activation, 'tie_word_embeddings': config.tie_embeddings,
  }


def rules(config: EncDecConfig, files: Files | None = None) -> list[Rule]:
  """Every tensor of a Switch Transformer."""
  del files
  rows = encdec.rules(config, untied_copies=True)
  for stack in ('encoder', 'decoder'):
    mlp = f'{stack}.block.{{i}}.layer.{encdec.ffn_index(stack)}.mlp'
    ours = f'{stack}/layers_{{i}}/ffn'
    sparse = f'{stack}_sparse'
    router = f'{mlp}.router.classifier'
    dense = f'{mlp}|{mlp.removesuffix("mlp")}DenseReluDense'
    rows += encdec.matrices(dense, ours, config.gated, f'{stack}_dense')
    rows.append(Rule(f'{router}.weight', f'{ours}/router/kernel', 'e d -> d e', sparse))
    if config.moe and config.moe.router_bias:
      rows.append(Rule(f'{router}.bias', f'{ours}/router/bias', 'e -> e', sparse))
    rows += encdec.matrices(
        f'{mlp}.experts.expert_{{e}}', f'{ours}/experts', config.gated, sparse, 'e '
    )
  return rows


FAMILY = Family(
    name='switch', model_types=('switch_transformers',),
    architecture='SwitchTransformersForConditionalGeneration', read_config=read_config,
    write_config=write_config, rules=rules, sizes=encdec.sizes, layers=encdec.layers,
    ignored=encdec.IGNORED,
)
