"""Mixtral (arXiv 2401.04088) as Hugging Face stores it."""

from typing import Any

from moejax.config import DecoderConfig, DecoderMoeConfig
from moejax.convert import decoder
from moejax.convert.family import Family, Files
from moejax.convert.hf_config import Fields
from moejax.convert.rules import Rule

_DEFAULTS = {
    'vocab_size': 32000, 'hidden_size': 4096, 'intermediate_size': 14336, 'num_hidden_layers': 32,
    'num_attention_heads': 32, 'num_key_value_heads': 8, 'max_position_embeddings': 4096 * 32,
    'rms_norm_eps': 1e-5, 'theta': 1e6, 'bos': 1, 'eos': 2,
}
_BLOCK = 'layers.{i}.block_sparse_moe'


def read_config(fields: Fields) -> DecoderConfig:
  """Our config; `router_jitter_noise` there multiplies the experts' input too."""
  moe = DecoderMoeConfig(
      num_experts=decoder.num_experts(fields, 8),
      top_k=fields.take('num_experts_per_tok', 2, int), router='topk', normalize_gates=True,
      input_jitter_noise=decoder.number(fields, 'router_jitter_noise', 0.0),
      router_aux_loss_coef=decoder.number(fields, 'router_aux_loss_coef', 0.001), balance='pooled',
  )
  window = fields.take('sliding_window', None, int, type(None))
  return DecoderConfig(
      family='mixtral', sliding_window=window, moe=moe, **decoder.read_plain(fields, _DEFAULTS)
  )


def write_config(config: DecoderConfig) -> dict[str, Any]:
  """The inverse of `read_config`."""
  moe = decoder.moe_of(config)
  decoder.require_plain(
      config, norm='rms', attention_bias=False, attention_out_bias=False, qk_norm='',
      clip_qkv=None, ffn_bias=False, gated=True, head_bias=False, full_attention_layers=(),
  )
  return {
      **decoder.write_plain(config), 'intermediate_size': moe.d_ff or config.d_ff,
      'num_local_experts': moe.num_experts,
      'num_experts_per_tok': moe.top_k, 'router_jitter_noise': moe.input_jitter_noise,
      'router_aux_loss_coef': moe.router_aux_loss_coef, 'sliding_window': config.sliding_window,
  }


def rules(config: DecoderConfig, files: Files | None = None) -> list[Rule]:
  """Every tensor, in the names on disk or in those of transformers 5 in memory."""
  names = files.names if files else ()
  return [
      *decoder.base_rules(config),
      decoder.router((f'{_BLOCK}.gate', 'layers.{i}.mlp.gate')),
      *decoder.experts(_BLOCK, decoder.W123, names),
  ]


FAMILY = Family(
    name='mixtral', model_types=('mixtral',), architecture='MixtralForCausalLM',
    read_config=read_config, write_config=write_config, rules=rules, sizes=decoder.sizes,
    layers=decoder.layers, ignored=decoder.IGNORED,
)
