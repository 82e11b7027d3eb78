"""GRIN-MoE (arXiv 2409.12136) and Phi-3.5-MoE as Hugging Face stores them."""

import dataclasses
from typing import Any

from moejax.config import DecoderConfig, DecoderMoeConfig
from moejax.convert import decoder
from moejax.convert.family import Family, Files
from moejax.convert.hf_config import Fields
from moejax.convert.rules import Rule

_DEFAULTS = {
    'vocab_size': 32064, 'hidden_size': 4096, 'intermediate_size': 6400, 'num_hidden_layers': 32,
    'num_attention_heads': 32, 'num_key_value_heads': 8, 'max_position_embeddings': 4096 * 32,
    'rms_norm_eps': 1e-5, 'theta': 1e6, 'bos': 1, 'eos': 2,
}
_BLOCK = 'layers.{i}.block_sparse_moe'


def read_config(fields: Fields) -> DecoderConfig:
  """Our config from `phimoe`'s or `grinmoe`'s; `router_jitter_noise` there is SparseMixer's eps.

  Input jitter is applied once, as transformers 4 does it.
  """
  moe = DecoderMoeConfig(
      num_experts=decoder.num_experts(fields, 16),
      top_k=fields.take('num_experts_per_tok', 2, int), router='sparsemixer_v2',
      jitter_eps=decoder.number(fields, 'router_jitter_noise', 0.01),
      input_jitter_noise=decoder.number(fields, 'input_jitter_noise', 0.0),
      router_aux_loss_coef=decoder.number(fields, 'router_aux_loss_coef', 0.001),
      expert_dropout_rate=decoder.number(fields, 'expert_dropout', 0.0), balance='pooled',
  )
  fields.require('hidden_dropout', 0.0, None)
  bias = fields.take('attention_bias', False, bool)
  head_bias = fields.take('lm_head_bias', False, bool)
  window = fields.take('sliding_window', None, int, type(None))
  return DecoderConfig(
      family='phimoe', norm='layer', attention_bias=bias, attention_out_bias=bias,
      head_bias=head_bias, sliding_window=window, moe=moe,
      **decoder.read_plain(fields, _DEFAULTS),
  )


def read_grin(fields: Fields) -> DecoderConfig:
  """The same for files of microsoft/GRIN-MoE."""
  return dataclasses.replace(read_config(fields), family='grin')


def write_config(config: DecoderConfig) -> dict[str, Any]:
  """The inverse of `read_config`; the router must be one of its kind."""
  moe = decoder.moe_of(config)
  decoder.require_plain(
      config, norm='layer', attention_out_bias=config.attention_bias, qk_norm='', clip_qkv=None,
      ffn_bias=False, gated=True, d_head=config.d_model // config.num_heads,
      full_attention_layers=(),
  )
  return {
      **decoder.write_plain(config), 'intermediate_size': moe.d_ff or config.d_ff,
      'num_local_experts': moe.num_experts,
      'num_experts_per_tok': moe.top_k, 'router_jitter_noise': moe.jitter_eps,
      'input_jitter_noise': moe.input_jitter_noise,
      'router_aux_loss_coef': moe.router_aux_loss_coef, 'attention_bias': config.attention_bias,
      'lm_head_bias': config.head_bias, 'sliding_window': config.sliding_window,
  }


def rules(config: DecoderConfig, files: Files | None = None) -> list[Rule]:
  """Every tensor, in the names on disk or in those of transformers 5 in memory."""
  names = files.names if files else ()
  return [
      *decoder.base_rules(config),
      decoder.router((f'{_BLOCK}.gate', 'layers.{i}.mlp.router', 'layers.{i}.mlp.gate')),
      *decoder.experts(_BLOCK, decoder.W123, names),
  ]


_SHARED: dict[str, Any] = dict(
    architecture='PhimoeForCausalLM', write_config=write_config, rules=rules,
    sizes=decoder.sizes, layers=decoder.layers, ignored=decoder.IGNORED,
)
FAMILIES = (
    Family(name='phimoe', model_types=('phimoe',), read_config=read_config, **_SHARED),
    # transformers has no class of its own for GRIN; its tensors are phimoe's.
    Family(name='grin', model_types=('phimoe', 'grinmoe'), read_config=read_grin, **_SHARED),
)
