"""A start that skips the plateau of encoder-decoder training.

From T5's initialisation the decoder learns bigrams first, and until cross-attention finds the right
places, which takes thousands of steps, the encoder gets no useful gradient and collapses to a
constant. Starting values alone remove that: no architecture, loss or checkpoint format changes.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax.config import EncDecConfig
from moejax.ops import attention


def align(params: Any, config: EncDecConfig) -> Any:
  """Fresh params whose encoder looks near itself and whose decoder looks for its own tokens.

  The encoder's relative bias falls with distance: one head of four looks left, one right, one near
  both, one far both. Cross-attention's queries start as its keys over sqrt(h), so a sentinel in the
  decoder finds the same sentinel in the encoder. Everything else stays random.
  """
  layers = {}
  for name, layer in params['decoder'].items():
    if name.startswith('layers_'):
      cross = layer['cross_attention']
      layer = {**layer, 'cross_attention': {**cross, 'q': cross['k'] * config.d_kv**-0.5}}
    layers[name] = layer
  bias = params['encoder']['relative_bias']
  local = jnp.asarray(local_bias(config), bias.dtype)
  return {
      **params, 'decoder': layers,
      'encoder': {**params['encoder'], 'relative_bias': bias + local},
  }


def local_bias(config: EncDecConfig, floor: float = -6.0) -> np.ndarray:
  """Bias [buckets, n] that falls linearly with distance, not below `floor`; heads in turn."""
  buckets, reach = config.relative_attention_num_buckets, config.relative_attention_max_distance
  row = attention.relative_buckets(
      2 * reach + 1, 2 * reach + 1, bidirectional=True, num_buckets=buckets, max_distance=reach
  )[reach]
  distance = np.arange(-reach, reach + 1)
  mean = np.array([
      np.abs(distance[row == b]).mean() if (row == b).any() else reach for b in range(buckets)
  ])
  right = np.arange(buckets) >= buckets // 2
  heads = []
  for n in range(config.num_heads):
    slope = (1.0, 1.0, 0.5, 0.15)[n % 4]
    bias = -slope * mean
    if n % 4 == 0:
      bias = np.where(right, floor, bias)
    elif n % 4 == 1:
      bias = np.where(right | (mean == 0), bias, floor)
    heads.append(np.maximum(bias, floor))
  return np.stack(heads, axis=1).astype(np.float32)
