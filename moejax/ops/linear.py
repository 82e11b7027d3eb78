"""Matmul of activations with a weight, always as one two-dimensional product.

XLA's CPU backend has a fast path for plain 2-D products only: the weight gradient of the same
product with two contracted axes took five times as long (bfloat16, jax 0.12). A few rows, as in
decoding, read the weight at half the memory's rate there; in C++ they read it at all of it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import extension
from kernels_pallas.grouped_matmul import cpu

# Rows that the product in C++ takes in one pass over the weight.
FEW_ROWS = 14


def linear(
    x: jax.Array, w: jax.Array, contract: int = 1, preferred: Any = None
) -> jax.Array:
  """Contracts the last `contract` axes of x with the first of w, in x's dtype."""
  inner = math.prod(w.shape[:contract])
  x_md, w_df = x.reshape(-1, inner), w.astype(x.dtype).reshape(inner, -1)
  by_xla = functools.partial(jnp.matmul, preferred_element_type=preferred)
  if _in_one_pass(x_md, w_df, preferred):
    dtype = preferred or x.dtype
    y_mf = jax.lax.platform_dependent(
        x_md, w_df, cpu=lambda x, w: cpu.matmul(x, w, dtype), default=by_xla
    )
  else:
    y_mf = by_xla(x_md, w_df)
  return y_mf.reshape(*x.shape[: x.ndim - contract], *w.shape[contract:])


def _in_one_pass(x_md: jax.Array, w_df: jax.Array, preferred: Any) -> bool:
  """Few rows, on one device: XLA cannot divide a foreign call over several."""
  few = 0 < len(x_md) <= FEW_ROWS
  return few and jax.device_count() == 1 and not extension.without(
      x_md.dtype, w_df.dtype, preferred or x_md.dtype
  )
