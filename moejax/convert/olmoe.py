"""OLMoE (arXiv 2409.02060) as Hugging Face stores it."""

from typing import Any

from moejax.config import DecoderConfig, DecoderMoeConfig
from moejax.convert import decoder
from moejax.convert.family import Family, Files
from moejax.convert.hf_config import Fields
from moejax.convert.rules import Rule

_DEFAULTS = {
    'vocab_size': 50304, 'hidden_size': 2048, 'intermediate_size': 2048, 'num_hidden_layers': 16,
    'num_attention_heads': 16, 'max_position_embeddings': 4096, 'rms_norm_eps': 1e-5,
    'theta': 1e4, 'pad': 1, 'eos': 50279,
}


def read_config(fields: Fields) -> DecoderConfig:
  """Our config: queries and keys normed over their whole width, perhaps clipped."""
  moe = DecoderMoeConfig(
      num_experts=decoder.num_experts(fields, 64),
      top_k=fields.take('num_experts_per_tok', 8, int), router='topk',
      normalize_gates=fields.take('norm_topk_prob', False, bool),
      router_aux_loss_coef=decoder.number(fields, 'router_aux_loss_coef', 0.01), balance='pooled',
  )
  clip = fields.take('clip_qkv', None, int, float, type(None))
  bias = fields.take('attention_bias', False, bool)
  return DecoderConfig(
      family='olmoe', qk_norm='full', clip_qkv=None if clip is None else float(clip),
      attention_bias=bias, attention_out_bias=bias, moe=moe,
      **decoder.read_plain(fields, _DEFAULTS),
  )


def write_config(config: DecoderConfig) -> dict[str, Any]:
  """The inverse of `read_config`."""
  moe = decoder.moe_of(config)
  decoder.require_plain(
      config, norm='rms', attention_out_bias=config.attention_bias, qk_norm='full',
      ffn_bias=False, gated=True, head_bias=False, sliding_window=None,
      d_head=config.d_model // config.num_heads,
  )
  return {
      **decoder.write_plain(config), 'intermediate_size': moe.d_ff or config.d_ff,
      'num_experts': moe.num_experts,
      'num_experts_per_tok': moe.top_k, 'norm_topk_prob': moe.normalize_gates,
      'router_aux_loss_coef': moe.router_aux_loss_coef, 'clip_qkv': config.clip_qkv,
      'attention_bias': config.attention_bias,
  }


def rules(config: DecoderConfig, files: Files | None = None) -> list[Rule]:
  """Every tensor; experts of their own or fused."""
  names = files.names if files else ()
  return [
      *decoder.base_rules(config), decoder.router(('layers.{i}.mlp.gate',)),
      *decoder.experts('layers.{i}.mlp', decoder.PROJ, names),
  ]


FAMILY = Family(
    name='olmoe', model_types=('olmoe',), architecture='OlmoeForCausalLM',
    read_config=read_config, write_config=write_config, rules=rules, sizes=decoder.sizes,
    layers=decoder.layers, ignored=decoder.IGNORED,
)
