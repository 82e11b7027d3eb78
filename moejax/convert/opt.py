"""OPT (arXiv 2205.01068) as Hugging Face stores it: dense, ReLU, learned positions."""

from typing import Any

from moejax.config import DecoderConfig
from moejax.convert import decoder
from moejax.convert.family import Family, Files
from moejax.convert.hf_config import Fields
from moejax.convert.rules import Rule

# Rows of the position table before position 0.
_OFFSET = 2


def read_config(fields: Fields) -> DecoderConfig:
  """Our config. The 350M model, which norms after its blocks, is refused."""
  fields.require('is_encoder_decoder', False)
  fields.require('do_layer_norm_before', True)
  fields.require('_remove_final_layer_norm', False)
  fields.require('layer_norm_elementwise_affine', True)
  fields.take('attention_dropout', 0.0, int, float)
  fields.take('activation_dropout', 0.0, int, float)
  fields.take('layerdrop', 0.0, int, float)
  width = fields.take('hidden_size', 768, int)
  fields.require('word_embed_proj_dim', width)
  heads = fields.take('num_attention_heads', 12, int)
  bias = fields.take('enable_bias', True, bool)
  return DecoderConfig(
      family='opt', vocab_size=fields.take('vocab_size', 50272, int), d_model=width,
      d_head=width // heads, d_ff=fields.take('ffn_dim', 3072, int), num_heads=heads,
      num_kv_heads=heads, num_layers=fields.take('num_hidden_layers', 12, int),
      max_positions=fields.take('max_position_embeddings', 2048, int),
      activation=fields.activation(fields.take('activation_function', 'relu', str)), gated=False,
      norm='layer', norm_eps=1e-5, rope=None, position_offset=_OFFSET, attention_bias=bias,
      attention_out_bias=bias, ffn_bias=bias,
      tie_embeddings=fields.take('tie_word_embeddings', True, bool),
      dropout_rate=decoder.number(fields, 'dropout', 0.1),
      initializer_std=decoder.number(fields, 'init_std', 0.02), **decoder.read_ids(fields, 1, 2, 2),
  )


def write_config(config: DecoderConfig) -> dict[str, Any]:
  """The inverse of `read_config`."""
  bias = config.attention_bias
  decoder.require_plain(
      config, norm='layer', norm_eps=1e-5, rope=None, position_offset=_OFFSET, qk_norm='',
      clip_qkv=None, gated=False, head_bias=False, moe=None, attention_out_bias=bias,
      ffn_bias=bias, sliding_window=None, num_kv_heads=config.num_heads,
      d_head=config.d_model // config.num_heads,
  )
  return {
      'vocab_size': config.vocab_size, 'hidden_size': config.d_model,
      'word_embed_proj_dim': config.d_model, 'ffn_dim': config.d_ff,
      'num_hidden_layers': config.num_layers, 'num_attention_heads': config.num_heads,
      'max_position_embeddings': config.max_positions, 'activation_function': config.activation,
      'enable_bias': bias, 'dropout': config.dropout_rate, 'init_std': config.initializer_std,
      'do_layer_norm_before': True, 'tie_word_embeddings': config.tie_embeddings,
      **decoder.write_ids(config),
  }


def _rule(theirs: str, ours: str, axes: str, layers: str = '', **kwargs: Any) -> Rule:
  """A rule for 'model.decoder.<theirs>', which files have called by shorter names too."""
  return Rule(
      f'model.decoder.{theirs}', ours, axes, layers, aliases=(f'decoder.{theirs}', theirs), **kwargs
  )


def rules(config: DecoderConfig, files: Files | None = None) -> list[Rule]:
  """Every tensor."""
  del files
  layer, ours = 'layers.{i}', 'decoder/layers_{i}'
  rows = [
      _rule('embed_tokens.weight', 'shared/embedding', 'v d -> v d',
            copies=('lm_head.weight',) if config.tie_embeddings else ()),
      _rule('embed_positions.weight', 'shared/positions', 'p d -> p d'),
  ]
  for theirs, our, where in (
      ('final_layer_norm', 'decoder/final_norm', ''),
      (f'{layer}.self_attn_layer_norm', f'{ours}/attention/norm', 'all'),
      (f'{layer}.final_layer_norm', f'{ours}/ffn/norm', 'all'),
  ):
    rows += [_rule(f'{theirs}.weight', our, 'd -> d', where),
             _rule(f'{theirs}.bias', f'{our}_bias', 'd -> d', where)]
  for theirs, our, axes, bias in (
      ('self_attn.q_proj', 'attention/q', '(n h) d -> d n h', '(n h) -> n h'),
      ('self_attn.k_proj', 'attention/k', '(g h) d -> d g h', '(g h) -> g h'),
      ('self_attn.v_proj', 'attention/v', '(g h) d -> d g h', '(g h) -> g h'),
      ('self_attn.out_proj', 'attention/o', 'd (n h) -> n h d', 'd -> d'),
      ('fc1', 'ffn/wi', 'f d -> d f', 'f -> f'), ('fc2', 'ffn/wo', 'd f -> f d', 'd -> d'),
  ):
    rows.append(_rule(f'{layer}.{theirs}.weight', f'{ours}/{our}', axes, 'all'))
    if config.attention_bias:
      rows.append(_rule(f'{layer}.{theirs}.bias', f'{ours}/{our}_bias', bias, 'all'))
  if not config.tie_embeddings:
    rows.append(Rule('lm_head.weight', 'lm_head/kernel', 'v d -> d v'))
  return rows


FAMILY = Family(
    name='opt', model_types=('opt',), architecture='OPTForCausalLM', read_config=read_config,
    write_config=write_config, rules=rules, sizes=decoder.sizes, layers=decoder.layers,
    ignored=decoder.IGNORED,
)
