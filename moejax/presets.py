"""Published configurations by name.

Sizes are those of arXiv 2101.03961 (table 1), arXiv 1910.10683, arXiv 2409.12136 (table 1) and the
released checkpoints. Phi-3.5-MoE has GRIN's sizes; its rotary factors come with its files.
"""

from typing import Any

from moejax.config import (
  DecoderConfig,
  DecoderMoeConfig,
  EncDecConfig,
  EncDecMoeConfig,
  ModelConfig,
  RopeConfig,
)
from moejax.errors import UserError, did_you_mean

_SWITCH_BASE = dict(
    d_model=768, d_kv=64, d_ff=3072, num_heads=12, num_layers=12, num_decoder_layers=12
)
_SWITCH_LARGE = dict(
    d_model=1024, d_kv=64, d_ff=4096, num_heads=16, num_layers=24, num_decoder_layers=24
)
_SWITCH_XXL = dict(
    d_model=4096, d_kv=64, d_ff=10240, num_heads=64, num_layers=24, num_decoder_layers=24,
    activation='gelu_new', gated=True, tie_embeddings=False,
)
_SWITCH_C = dict(
    d_model=2080, d_kv=64, d_ff=6144, num_heads=32, num_layers=15, num_decoder_layers=15
)
# name: (d_model, d_kv, d_ff, heads, layers) of T5 v1.0
_T5 = {
    't5-small': (512, 64, 2048, 8, 6),
    't5-base': (768, 64, 3072, 12, 12),
    't5-large': (1024, 64, 4096, 16, 24),
    't5-3b': (1024, 128, 16384, 32, 24),
    't5-11b': (1024, 128, 65536, 128, 24),
}
# the same of T5 v1.1: gated GELU, untied head
_T5_V1_1 = {
    't5-v1_1-small': (512, 64, 1024, 6, 8),
    't5-v1_1-base': (768, 64, 2048, 12, 12),
    't5-v1_1-large': (1024, 64, 2816, 16, 24),
    't5-v1_1-xl': (2048, 64, 5120, 32, 24),
    't5-v1_1-xxl': (4096, 64, 10240, 64, 24),
}


def _switch(shape: dict, num_experts: int, step: int = 2) -> EncDecConfig:
  moe = EncDecMoeConfig(
      num_experts=num_experts, encoder_sparse_step=step, decoder_sparse_step=step,
      expert_capacity=64,
  )
  return EncDecConfig(family='switch', vocab_size=32128, moe=moe, **shape)


def _t5(sizes: tuple[int, ...], **kwargs) -> EncDecConfig:
  d_model, d_kv, d_ff, heads, layers = sizes
  return EncDecConfig(
      family='t5', vocab_size=32128, d_model=d_model, d_kv=d_kv, d_ff=d_ff, num_heads=heads,
      num_layers=layers, num_decoder_layers=layers, **kwargs,
  )


def _decoder(
    family: str, d_model: int, d_ff: int, heads: int, kv_heads: int, layers: int, vocab_size: int,
    *, d_head: int = 128, theta: float = 1e6, **kwargs: Any,
) -> DecoderConfig:
  kwargs.setdefault('rope', RopeConfig(theta=theta))
  return DecoderConfig(
      family=family, vocab_size=vocab_size, d_model=d_model, d_head=d_head, d_ff=d_ff,
      num_heads=heads, num_kv_heads=kv_heads, num_layers=layers, **kwargs,
  )


def _topk(num_experts: int, top_k: int = 2, **kwargs: Any) -> DecoderMoeConfig:
  return DecoderMoeConfig(
      num_experts=num_experts, top_k=top_k, router='topk', balance='pooled', **kwargs
  )


def _grin(d_model: int = 4096, d_ff: int = 6400, layers: int = 32) -> DecoderConfig:
  """GRIN's 16x3.8B body, or a smaller one of its shape."""
  return _decoder(
      'grin', d_model, d_ff, d_model // 128, d_model // 512, layers, 32064, theta=1e4,
      norm='layer', attention_bias=True, attention_out_bias=True, head_bias=True,
      sliding_window=2047, max_positions=4096, bos_id=1, eos_ids=(32000,),
      moe=DecoderMoeConfig(num_experts=16, router_aux_loss_coef=0.001),
  )


# name: (d_model, d_ff, heads, layers) of OPT
_OPT = {
    'opt-125m': (768, 3072, 12, 12), 'opt-1.3b': (2048, 8192, 32, 24),
    'opt-2.7b': (2560, 10240, 32, 32), 'opt-6.7b': (4096, 16384, 32, 32),
    'opt-13b': (5120, 20480, 40, 40), 'opt-30b': (7168, 28672, 56, 48),
    'opt-66b': (9216, 36864, 72, 64),
}


def _opt(d_model: int, d_ff: int, heads: int, layers: int) -> DecoderConfig:
  return _decoder(
      'opt', d_model, d_ff, heads, heads, layers, 50272, d_head=d_model // heads, norm='layer',
      max_positions=2048, rope=None, position_offset=2, gated=False, activation='relu',
      attention_bias=True, attention_out_bias=True, ffn_bias=True, tie_embeddings=True,
      dropout_rate=0.1, pad_id=1, bos_id=2, eos_ids=(2,),
  )


_ENDS: dict[str, Any] = dict(bos_id=1, eos_ids=(2,))
_QWEN: dict[str, Any] = dict(norm_eps=1e-6, eos_ids=(151643,), max_positions=32768)
_QWEN3: dict[str, Any] = dict(_QWEN, qk_norm='head', max_positions=40960)
_LLAMA31 = RopeConfig(theta=5e5, kind='llama3', factor=8.0, original_max_positions=8192)

DECODERS: dict[str, DecoderConfig] = {
    'grin-moe': _grin(),
    'mixtral-8x7b': _decoder(
        'mixtral', 4096, 14336, 32, 8, 32, 32000, max_positions=32768, **_ENDS,
        moe=_topk(8, normalize_gates=True, router_aux_loss_coef=0.02),
    ),
    'mixtral-8x22b': _decoder(
        'mixtral', 6144, 16384, 48, 8, 56, 32768, max_positions=65536, **_ENDS,
        moe=_topk(8, normalize_gates=True),
    ),
    'olmoe-1b-7b': _decoder(
        'olmoe', 2048, 1024, 16, 16, 16, 50304, theta=1e4, qk_norm='full', pad_id=1,
        eos_ids=(50279,), moe=_topk(64, 8, router_aux_loss_coef=0.01),
    ),
    'qwen1.5-moe-a2.7b': _decoder(
        'qwen2_moe', 2048, 5632, 16, 16, 24, 151936, attention_bias=True,
        **{**_QWEN, 'max_positions': 8192},
        moe=_topk(60, 4, d_ff=1408, shared_d_ff=5632, shared_gate=True),
    ),
    'qwen3-30b-a3b': _decoder(
        'qwen3_moe', 2048, 6144, 32, 4, 48, 151936, **_QWEN3,
        moe=_topk(128, 8, d_ff=768, normalize_gates=True),
    ),
    'qwen3-235b-a22b': _decoder(
        'qwen3_moe', 4096, 12288, 64, 4, 94, 151936, **_QWEN3,
        moe=_topk(128, 8, d_ff=1536, normalize_gates=True),
    ),
    'llama-2-7b': _decoder('llama', 4096, 11008, 32, 32, 32, 32000, theta=1e4, **_ENDS),
    'llama-3.1-8b': _decoder(
        'llama', 4096, 14336, 32, 8, 32, 128256, rope=_LLAMA31, max_positions=131072,
        bos_id=128000, eos_ids=(128001,),
    ),
    'mistral-7b': _decoder(
        'mistral', 4096, 14336, 32, 8, 32, 32000, theta=1e4, sliding_window=4096,
        max_positions=32768, **_ENDS,
    ),
    'qwen2-7b': _decoder(
        'qwen2', 3584, 18944, 28, 4, 28, 152064, attention_bias=True,
        **{**_QWEN, 'max_positions': 131072},
    ),
    'qwen3-8b': _decoder('qwen3', 4096, 12288, 32, 8, 36, 151936, **_QWEN3),
    'qwen3-0.6b': _decoder(
        'qwen3', 1024, 3072, 16, 8, 28, 151936, tie_embeddings=True, **_QWEN3
    ),
    **{name: _opt(*sizes) for name, sizes in _OPT.items()},
}

PRESETS: dict[str, ModelConfig] = {
    **{f'switch-base-{e}': _switch(_SWITCH_BASE, e) for e in (8, 16, 32, 64, 128, 256)},
    'switch-large-128': _switch(_SWITCH_LARGE, 128),
    'switch-xxl-128': _switch(_SWITCH_XXL, 128),
    'switch-c-2048': _switch(_SWITCH_C, 2048, step=1),
    **{name: _t5(sizes) for name, sizes in _T5.items()},
    **{
        name: _t5(sizes, activation='gelu_new', gated=True, tie_embeddings=False)
        for name, sizes in _T5_V1_1.items()
    },
    **DECODERS,
}


def preset(name: str) -> ModelConfig:
  """The configuration of a published model; an unknown name raises UserError."""
  if name not in PRESETS:
    raise UserError(f'unknown preset {name!r}{did_you_mean(name, PRESETS)}')
  return PRESETS[name]
