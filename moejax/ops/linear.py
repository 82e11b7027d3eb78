"""Matmul of activations with a weight, always as one two-dimensional product.

XLA's CPU backend has a fast path for plain 2-D products only: the weight gradient of the same
product with two contracted axes took five times as long (bfloat16, jax 0.12).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp


def linear(
    x: jax.Array, w: jax.Array, contract: int = 1, preferred: Any = None
) -> jax.Array:
  """Contracts the last `contract` axes of x with the first of w, in x's dtype."""
  inner = math.prod(w.shape[:contract])
  y = jnp.matmul(
      x.reshape(-1, inner),
      w.astype(x.dtype).reshape(inner, -1),
      preferred_element_type=preferred,
  )
  return y.reshape(*x.shape[: x.ndim - contract], *w.shape[contract:])
