"""What decoder-only families share in a Hugging Face folder: rules, config fields, rope."""

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.config import DecoderConfig, DecoderMoeConfig, RopeConfig, StackConfig
from moejax.convert.hf_config import Fields
from moejax.convert.rules import Rule
from moejax.errors import UserError, did_you_mean

# Buffers that files of old versions hold.
IGNORED = (r'(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq',)
# What each kind of rope cannot do without.
_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    'default': (), 'linear': ('factor',),
    'llama3': (
        'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'
    ),
    'yarn': ('factor',),
    'longrope': ('short_factor', 'long_factor', 'original_max_position_embeddings'),
}
_ROPE_NAMES = {
    'rope_theta': 'theta', 'partial_rotary_factor': 'share', 'factor': 'factor',
    'original_max_position_embeddings': 'original_max_positions',
    'low_freq_factor': 'low_freq_factor', 'high_freq_factor': 'high_freq_factor',
    'beta_fast': 'beta_fast', 'beta_slow': 'beta_slow', 'truncate': 'truncate',
    'attention_factor': 'attention_factor', 'mscale': 'mscale',
    'mscale_all_dim': 'mscale_all_dim', 'short_factor': 'short_factor',
    'long_factor': 'long_factor', 'short_mscale': 'short_mscale', 'long_mscale': 'long_mscale',
}


def number(fields: Fields, name: str, default: float) -> float:
  """A field that is a number, as a float."""
  return float(fields.take(name, default, int, float))


def num_experts(fields: Fields, default: int) -> int:
  """The number of experts, under either of its names."""
  fields.rename({'num_local_experts': 'num_experts'})
  return fields.take('num_experts', default, int)


def read_rope(fields: Fields, theta: float, max_positions: int) -> RopeConfig:
  """Rotary positions from `rope_parameters`, or from `rope_theta` and `rope_scaling` before it."""
  parameters = fields.take('rope_parameters', None, dict, type(None))
  scaling = fields.take('rope_scaling', None, dict, type(None))
  name = 'rope_scaling' if parameters is None and scaling else 'rope_parameters'
  given = {**(scaling or {}), **(parameters or {})}
  base = fields.take('rope_theta', None, int, float, type(None))
  share = fields.take('partial_rotary_factor', None, int, float, type(None))
  trained = fields.take('original_max_position_embeddings', None, int, type(None))
  for key, value in (
      ('rope_theta', theta if base is None else base), ('partial_rotary_factor', share),
      ('original_max_position_embeddings', trained),
  ):
    if value is not None and given.get(key) is None:
      given[key] = value
  kind = given.pop('rope_type', given.pop('type', None)) or 'default'
  given.pop('type', None)
  where = f'{fields.where}: {name}'
  if kind not in _ROPE_NEEDS:
    raise UserError(
        f'{where}: rope_type = {kind!r}: moejax has {", ".join(_ROPE_NEEDS)}'
        f'{did_you_mean(str(kind), _ROPE_NEEDS)}'
    )
  if kind in ('yarn', 'longrope'):
    given.setdefault('original_max_position_embeddings', max_positions)
  missing = [key for key in _ROPE_NEEDS[kind] if given.get(key) is None]
  if missing:
    raise UserError(f'{where}: {missing[0]!r} is missing, which rope_type = {kind!r} needs')
  unknown = sorted(set(given) - set(_ROPE_NAMES))
  if unknown:
    raise UserError(
        f'{where}: unknown field {unknown[0]!r}{did_you_mean(unknown[0], _ROPE_NAMES)}'
    )
  values: dict[str, Any] = {
      _ROPE_NAMES[key]: tuple(map(float, value)) if isinstance(value, list) else value
      for key, value in given.items() if value is not None
  }
  if kind == 'longrope':
    values.setdefault('factor', max(max_positions / values['original_max_positions'], 1.0))
  try:
    return RopeConfig(kind=kind, **values)
  except UserError as error:
    raise UserError(f'{where}: {error}') from error


def write_rope(rope: RopeConfig) -> dict[str, Any]:
  """`rope_parameters`, and `rope_theta` and `rope_scaling` for older readers."""
  default = RopeConfig()
  given = {
      theirs: getattr(rope, ours) for theirs, ours in _ROPE_NAMES.items()
      if ours not in ('theta', 'share') and getattr(rope, ours) != getattr(default, ours)
  }
  for key in _ROPE_NEEDS[rope.kind]:
    given[key] = getattr(rope, _ROPE_NAMES[key])
  given = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
  shared: dict[str, Any] = {'rope_theta': rope.theta}
  if rope.share != 1.0:
    shared['partial_rotary_factor'] = rope.share
  scaling = None if rope.kind == 'default' else {'rope_type': rope.kind, 'type': rope.kind, **given}
  return {
      'rope_parameters': {'rope_type': rope.kind, **shared, **given}, 'rope_scaling': scaling,
      **shared,
  }


def read_ids(fields: Fields, pad: int | None, bos: int | None, eos: int | None) -> dict[str, Any]:
  """Padding, begin- and end-of-text ids."""
  ends = fields.take('eos_token_id', eos, int, list, type(None))
  ends = () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
  return {
      'pad_id': fields.take('pad_token_id', pad, int, type(None)),
      'bos_id': fields.take('bos_token_id', bos, int, type(None)), 'eos_ids': ends,
  }


def write_ids(config: StackConfig) -> dict[str, Any]:
  """The inverse of `read_ids`."""
  ends: Any = list(config.eos_ids)
  if len(ends) < 2:
    ends = ends[0] if ends else None
  return {'pad_token_id': config.pad_id, 'bos_token_id': config.bos_id, 'eos_token_id': ends}


def read_plain(fields: Fields, defaults: Mapping[str, Any]) -> dict[str, Any]:
  """What Llama-like configurations have alike: sizes, heads, norms, rope, special ids.

  defaults: Hugging Face's, where a field is left out; 'pad', 'bos', 'eos' and 'theta' too.
  """
  fields.require('is_decoder', False, True)
  fields.require('is_encoder_decoder', False)
  fields.take('attention_dropout', 0.0, int, float)
  fields.take('pretraining_tp', 1, int)
  size = lambda name: fields.take(name, defaults[name], int)
  d_model, heads = size('hidden_size'), size('num_attention_heads')
  kv_heads = fields.take(
      'num_key_value_heads', defaults.get('num_key_value_heads'), int, type(None)
  )
  d_head = fields.take('head_dim', defaults.get('head_dim'), int, type(None))
  if d_head is None and d_model % heads:
    raise UserError(
        f'{fields.where}: hidden_size = {d_model} does not divide by num_attention_heads = {heads}:'
        ' correct one, or give head_dim'
    )
  positions = size('max_position_embeddings')
  return {
      'vocab_size': size('vocab_size'), 'd_model': d_model, 'd_ff': size('intermediate_size'),
      'num_layers': size('num_hidden_layers'), 'num_heads': heads,
      'num_kv_heads': heads if kv_heads is None else kv_heads,
      'd_head': d_model // heads if d_head is None else d_head, 'max_positions': positions,
      'activation': fields.activation(fields.take('hidden_act', 'silu', str)),
      'norm_eps': number(fields, 'rms_norm_eps', defaults['rms_norm_eps']),
      'initializer_std': number(fields, 'initializer_range', 0.02),
      'tie_embeddings': fields.take('tie_word_embeddings', False, bool),
      'rope': read_rope(fields, defaults['theta'], positions),
      **read_ids(fields, defaults.get('pad'), defaults.get('bos'), defaults.get('eos')),
  }


def write_plain(config: DecoderConfig) -> dict[str, Any]:
  """The inverse of `read_plain`."""
  assert config.rope is not None
  return {
      'vocab_size': config.vocab_size, 'hidden_size': config.d_model,
      'intermediate_size': config.d_ff, 'num_hidden_layers': config.num_layers,
      'num_attention_heads': config.num_heads, 'num_key_value_heads': config.num_kv_heads,
      'head_dim': config.d_head, 'max_position_embeddings': config.max_positions,
      'hidden_act': config.activation, 'rms_norm_eps': config.norm_eps,
      'initializer_range': config.initializer_std, 'tie_word_embeddings': config.tie_embeddings,
      **write_rope(config.rope), **write_ids(config),
  }


def moe_of(config: DecoderConfig) -> DecoderMoeConfig:
  """The config's experts; UserError for a dense model."""
  if config.moe is None:
    raise UserError(f'model.moe is null: a {config.family} model has experts')
  return config.moe


def require_plain(config: StackConfig, **wanted: Any) -> None:
  """Raises UserError for a setting that a family's files cannot say."""
  for name, value in wanted.items():
    found = getattr(config, name)
    if found != value:
      raise UserError(
          f'model.{name} = {found!r}: Hugging Face {config.family} files have {value!r}: keep the '
          'moejax format, or choose a family that has it'
      )


def sizes(config: DecoderConfig) -> dict[str, int]:
  """Axis letters to sizes; i is the hidden width of an expert, j of the shared one, o is 1."""
  moe = config.moe
  return {
      'v': config.vocab_size, 'd': config.d_model, 'n': config.num_heads,
      'g': config.num_kv_heads, 'h': config.d_head, 'f': config.d_ff,
      'x': config.num_heads * config.d_head, 'y': config.num_kv_heads * config.d_head,
      'e': moe.num_experts if moe else 0, 'i': (moe.d_ff or config.d_ff) if moe else 0,
      'j': moe.shared_d_ff if moe else 0, 'o': 1,
      'p': config.max_positions + config.position_offset,
  }


def layers(config: DecoderConfig) -> dict[str, Sequence[int]]:
  """The layer sets that rules run over: all, dense and sparse ones."""
  sparse = config.sparse_layers()
  return {
      'all': range(config.num_layers), 'sparse': sparse,
      'dense': [i for i in range(config.num_layers) if i not in sparse],
  }


def rule(theirs: str, ours: str, axes: str, layers: str = '', **kwargs: Any) -> Rule:
  """A rule for 'model.<theirs>', which files of the bare model call '<theirs>'."""
  return Rule(f'model.{theirs}', ours, axes, layers, aliases=(theirs,), **kwargs)


def _norm(config: DecoderConfig, theirs: str, ours: str, layers: str = '') -> list[Rule]:
  rows = [rule(f'{theirs}.weight', ours, 'd -> d', layers)]
  if config.norm == 'layer':
    rows.append(rule(f'{theirs}.bias', f'{ours}_bias', 'd -> d', layers))
  return rows


def base_rules(config: DecoderConfig) -> list[Rule]:
  """Everything but the FFNs' matrices, in Llama's names."""
  tied = config.tie_embeddings
  rows = [
      rule('embed_tokens.weight', 'shared/embedding', 'v d -> v d',
           copies=('lm_head.weight',) if tied else ()),
      *_norm(config, 'norm', 'decoder/final_norm'),
      *_norm(config, 'layers.{i}.input_layernorm', 'decoder/layers_{i}/attention/norm', 'all'),
      *_norm(config, 'layers.{i}.post_attention_layernorm', 'decoder/layers_{i}/ffn/norm', 'all'),
      *attention_rules(config, 'layers.{i}.self_attn', 'o_proj'),
  ]
  if not tied:
    rows.append(Rule('lm_head.weight', 'lm_head/kernel', 'v d -> d v'))
  if config.head_bias:
    rows.append(Rule('lm_head.bias', 'lm_head/bias', 'v -> v'))
  return rows


def attention_rules(config: DecoderConfig, theirs: str, out: str) -> list[Rule]:
  """Projections, biases and norms of queries and keys."""
  ours, rows = 'decoder/layers_{i}/attention', []
  for name, heads, flat in (('q', 'n', 'x'), ('k', 'g', 'y'), ('v', 'g', 'y')):
    rows.append(rule(f'{theirs}.{name}_proj.weight', f'{ours}/{name}',
                     f'({heads} h) d -> d {heads} h', 'all'))
    if config.attention_bias:
      rows.append(rule(f'{theirs}.{name}_proj.bias', f'{ours}/{name}_bias',
                       f'({heads} h) -> {heads} h', 'all'))
    if config.qk_norm and name != 'v':
      axis = 'h' if config.qk_norm == 'head' else flat
      rows.append(rule(f'{theirs}.{name}_norm.weight', f'{ours}/{name}_norm',
                       f'{axis} -> {axis}', 'all'))
  rows.append(rule(f'{theirs}.{out}.weight', f'{ours}/o', 'd (n h) -> n h d', 'all'))
  if config.attention_out_bias:
    rows.append(rule(f'{theirs}.{out}.bias', f'{ours}/o_bias', 'd -> d', 'all'))
  return rows


# Their names of gate, wi and wo.
PROJ = {'gate': 'gate_proj', 'wi': 'up_proj', 'wo': 'down_proj'}
W123 = {'gate': 'w1', 'wi': 'w3', 'wo': 'w2'}


def matrices(
    theirs: str, ours: str, layers: str, width: str = 'f', names: Mapping[str, str] = PROJ,
    prefix: str = '',
) -> list[Rule]:
  """The three matrices of a gated FFN, or of a stack of them with prefix 'e '."""
  return [
      rule(f'{theirs}.{their}.weight', f'{ours}/{our}',
           f'd {width} -> {prefix}{width} d' if our == 'wo' else f'{width} d -> {prefix}d {width}',
           layers)
      for our, their in names.items()
  ]


def experts(theirs: str, names: Mapping[str, str], present: Sequence[str]) -> list[Rule]:
  """Experts of their own, or fused as transformers 5 holds them in memory, whichever is present."""
  ours, width = 'decoder/layers_{i}/ffn/experts', 'i'
  if not any(name.endswith('.experts.gate_up_proj') for name in present):
    return matrices(f'{theirs}.experts.{{e}}', ours, 'sparse', width, names, 'e ')
  fused = 'layers.{i}.mlp.experts'
  return [
      rule(f'{fused}.gate_up_proj', f'{ours}/gate', f'{width} d -> e d {width}', 'sparse',
           rows=True, part=(0, 2)),
      rule(f'{fused}.gate_up_proj', f'{ours}/wi', f'{width} d -> e d {width}', 'sparse',
           rows=True, part=(1, 2), shares=True),
      rule(f'{fused}.down_proj', f'{ours}/wo', f'd {width} -> e {width} d', 'sparse', rows=True),
  ]


def router(names: Sequence[str]) -> Rule:
  """The router's kernel under the names it has had, the one to write first."""
  written, *aliases = names
  return Rule(
      f'model.{written}.weight', 'decoder/layers_{i}/ffn/router/kernel', 'e d -> d e', 'sparse',
      aliases=(f'{written}.weight',
               *(f'{p}{a}.weight' for a in aliases for p in ('model.', ''))),
  )
