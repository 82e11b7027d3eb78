"""Qwen2 and Qwen3 (arXiv 2407.10671, 2505.09388), dense and MoE, as Hugging Face stores them."""

from collections.abc import Mapping
import functools
from typing import Any

from moejax.config import DecoderConfig, DecoderMoeConfig
from moejax.convert import decoder
from moejax.convert.family import Family, Files
from moejax.convert.hf_config import Fields
from moejax.convert.rules import Rule

_DENSE = {
    'vocab_size': 151936, 'hidden_size': 4096, 'intermediate_size': 22016, 'num_hidden_layers': 32,
    'num_attention_heads': 32, 'num_key_value_heads': 32, 'max_position_embeddings': 32768,
    'rms_norm_eps': 1e-6, 'theta': 1e4,
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    'qwen2': _DENSE,
    'qwen3': {**_DENSE, 'head_dim': 128},
    'qwen2_moe': {
        **_DENSE, 'hidden_size': 2048, 'intermediate_size': 5632, 'num_hidden_layers': 24,
        'num_attention_heads': 16, 'num_key_value_heads': 16,
    },
    'qwen3_moe': {
        **_DENSE, 'hidden_size': 2048, 'intermediate_size': 6144, 'num_hidden_layers': 24,
        'num_key_value_heads': 4,
    },
}


def _experts(family: str, fields: Fields) -> DecoderMoeConfig:
  second = family == 'qwen2_moe'
  dense = fields.take('mlp_only_layers', None, list, type(None))
  shared = {}
  if second:
    width = fields.take('shared_expert_intermediate_size', 5632, int)
    shared = {'shared_d_ff': width, 'shared_gate': True}
  return DecoderMoeConfig(
      num_experts=decoder.num_experts(fields, 60 if second else 128),
      top_k=fields.take('num_experts_per_tok', 4 if second else 8, int), router='topk',
      normalize_gates=fields.take('norm_topk_prob', False, bool),
      d_ff=fields.take('moe_intermediate_size', 1408 if second else 768, int),
      sparse_step=fields.take('decoder_sparse_step', 1, int), dense_layers=tuple(dense or ()),
      router_aux_loss_coef=decoder.number(fields, 'router_aux_loss_coef', 0.001),
      balance='pooled', **shared,
  )


def _window(family: str, fields: Fields, layers: int) -> dict[str, Any]:
  """The window and the layers without one, as transformers derives them."""
  used = fields.take('use_sliding_window', False, bool)
  window = fields.take('sliding_window', 4096, int, type(None))
  full_from = fields.take('max_window_layers', 28, int, type(None))
  kinds = fields.take('layer_types', None, list, type(None))
  if not used or not window:
    return {}
  if kinds is None and family == 'qwen2_moe':
    sliding = [i for i in range(layers) if (i + 1) % 2 and i < (full_from or 0)]
  elif kinds is None and family != 'qwen3_moe':
    sliding = [i for i in range(layers) if i >= (full_from or 0)]
  else:
    kinds = kinds or ['sliding_attention'] * layers
    sliding = [i for i, kind in enumerate(kinds) if kind == 'sliding_attention']
  if not sliding:
    return {}
  full = tuple(i for i in range(layers) if i not in sliding)
  return {'sliding_window': window, 'full_attention_layers': full}


def read_config(family: str, fields: Fields) -> DecoderConfig:
  """Our config; Qwen2 has biases on queries, keys and values, Qwen3 norms each head of them."""
  moe = _experts(family, fields) if family.endswith('moe') else None
  third = family.startswith('qwen3')
  bias = fields.take('attention_bias', False, bool) if third else True
  if family == 'qwen2_moe':
    bias = fields.take('qkv_bias', True, bool)
  plain = decoder.read_plain(fields, _DEFAULTS[family])
  return DecoderConfig(
      family=family, attention_bias=bias, attention_out_bias=bias and third,
      qk_norm='head' if third else '', moe=moe, **_window(family, fields, plain['num_layers']),
      **plain,
  )


def write_config(config: DecoderConfig) -> dict[str, Any]:
  """The inverse of `read_config`."""
  third = config.family.startswith('qwen3')
  decoder.require_plain(
      config, norm='rms', clip_qkv=None, gated=True, head_bias=False, ffn_bias=False,
      qk_norm='head' if third else '', attention_out_bias=third and config.attention_bias,
  )
  values = decoder.write_plain(config)
  values |= {
      'use_sliding_window': config.sliding_window is not None,
      'sliding_window': config.sliding_window or 4096,
      'layer_types': [
          'full_attention' if config.window_of(i) is None else 'sliding_attention'
          for i in range(config.num_layers)
      ],
  }
  if third:
    values['attention_bias'] = config.attention_bias
  elif config.family == 'qwen2_moe':
    values['qkv_bias'] = config.attention_bias
  else:
    decoder.require_plain(config, attention_bias=True)
  if config.family == 'qwen3_moe':
    decoder.require_plain(config, full_attention_layers=())
    del values['layer_types']
  if not config.family.endswith('moe'):
    return values
  moe = decoder.moe_of(config)
  values |= {
      'num_experts': moe.num_experts, 'num_experts_per_tok': moe.top_k,
      'norm_topk_prob': moe.normalize_gates, 'moe_intermediate_size': moe.d_ff or config.d_ff,
      'decoder_sparse_step': moe.sparse_step, 'mlp_only_layers': list(moe.dense_layers),
      'router_aux_loss_coef': moe.router_aux_loss_coef,
  }
  if config.family == 'qwen2_moe':
    values['shared_expert_intermediate_size'] = moe.shared_d_ff
  return values


def rules(config: DecoderConfig, files: Files | None = None) -> list[Rule]:
  """Every tensor; experts of their own or fused."""
  names = files.names if files else ()
  mlp, ours = 'layers.{i}.mlp', 'decoder/layers_{i}/ffn'
  rows = [*decoder.base_rules(config), *decoder.matrices(mlp, ours, 'dense')]
  if config.moe is not None:
    rows += [decoder.router((f'{mlp}.gate',)), *decoder.experts(mlp, decoder.PROJ, names)]
    if config.moe.shared_d_ff:
      rows += decoder.matrices(f'{mlp}.shared_expert', f'{ours}/shared', 'sparse', 'j')
      rows.append(decoder.rule(
          f'{mlp}.shared_expert_gate.weight', f'{ours}/shared/scale', 'o d -> d o', 'sparse'
      ))
  return rows


_ARCHITECTURES = {
    'qwen2': 'Qwen2ForCausalLM', 'qwen3': 'Qwen3ForCausalLM',
    'qwen2_moe': 'Qwen2MoeForCausalLM', 'qwen3_moe': 'Qwen3MoeForCausalLM',
}
FAMILIES = tuple(
    Family(
        name=name, model_types=(name,), architecture=architecture,
        read_config=functools.partial(read_config, name), write_config=write_config, rules=rules,
        sizes=decoder.sizes, layers=decoder.layers, ignored=decoder.IGNORED,
    )
    for name, architecture in _ARCHITECTURES.items()
)
