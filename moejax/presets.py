"""Published Switch Transformer and T5 configurations by name.

Sizes are those of arXiv 2101.03961 (table 1), arXiv 1910.10683 and the released checkpoints.
"""

from moejax.config import EncDecConfig, EncDecMoeConfig, ModelConfig
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
}


def preset(name: str) -> ModelConfig:
  """The configuration of a published model; an unknown name raises UserError."""
  if name not in PRESETS:
    raise UserError(f'unknown preset {name!r}{did_you_mean(name, PRESETS)}')
  return PRESETS[name]
