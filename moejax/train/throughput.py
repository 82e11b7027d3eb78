"""FLOPs of a training step from shapes, and the peak they are a share of."""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from moejax import config as config_lib, model, tree


def forward_flops(config: config_lib.ModelConfig, source: int, target: int) -> float:
  """Floating-point operations of one forward pass on one sample of `source` + `target` tokens.

  Two per weight and token in every matmul, attention scores and mixtures included; a token uses one
  expert of a sparse layer. Look-ups, norms and softmaxes are not counted.
  """
  params = tree.flatten(model.abstract_params(config))
  total = 0.0
  for path, leaf in params.items():
    size = math.prod(leaf.shape)
    if path == 'shared/embedding':
      total += 2.0 * size * target if config.tie_embeddings else 0.0
    elif leaf.ndim < 2 or path.endswith('relative_bias'):
      continue
    else:
      used = size / config.moe.num_experts if '/experts/' in path and config.moe else size
      from_source = path.startswith('encoder/') or path.endswith(
          ('cross_attention/k', 'cross_attention/v')
      )
      total += 2.0 * used * (source if from_source else target)
  inner = config.num_heads * config.d_kv
  pairs = config.num_layers * source**2 + config.num_decoder_layers * (target**2 + target * source)
  return total + 4.0 * inner * pairs


def train_flops(config: config_lib.ModelConfig, samples: int, source: int, target: int) -> float:
  """Operations of a training step: forward, and twice that backward; recomputation not counted."""
  return 3.0 * samples * forward_flops(config, source, target)


def measure_peak(dtype: Any, seconds: float = 0.3) -> float:
  """Best floating-point rate of a plain matmul on one device, operations a second."""
  n = 2048 if jax.default_backend() == 'cpu' else 8192
  a = jnp.ones((n, n), dtype)
  dot = jax.jit(lambda x: jnp.dot(x, x))
  jax.block_until_ready(dot(a))
  best, end = math.inf, time.perf_counter() + seconds
  while time.perf_counter() < end:
    start = time.perf_counter()
    jax.block_until_ready(dot(a))
    best = min(best, time.perf_counter() - start)
  return 2.0 * n**3 / best if best < math.inf else 0.0
