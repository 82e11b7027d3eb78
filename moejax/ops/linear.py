"""Matmul of activations with a weight, always as one two-dimensional product.

XLA's CPU backend has a fast path for plain 2-D products only: the weight gradient of the same
product with two contracted axes took five times as long (bfloat16, jax 0.12). A few rows, as in
decoding, go by C++ there: eight read a large float32 weight in half of XLA's time, one a bfloat16
weight in a third to a tenth.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul import few_rows


def linear(
    x: jax.Array, w: jax.Array, contract: int = 1, preferred: Any = None
) -> jax.Array:
  """Contracts the last `contract` axes of x with the first of w, in x's dtype."""
  inner = math.prod(w.shape[:contract])
  x_md, w_df = x.reshape(-1, inner), w.reshape(inner, -1)
  dtype = preferred or x.dtype
  if few_rows.supports(x_md, w_df, dtype):
    y_mf = _by_xla(x_md, w_df, preferred)
  else:
    y_mf = jax.lax.platform_dependent(
        x_md, w_df, cpu=functools.partial(few_rows.matmul, dtype=dtype),
        default=functools.partial(_by_xla, preferred=preferred),
    )
  return y_mf.reshape(*x.shape[: x.ndim - contract], *w.shape[contract:])


def tied_logits(x: jax.Array, embedding_vd: jax.Array) -> jax.Array:
  """x by an embedding's rows, float32 [..., v]: by XLA, which transposes nothing."""
  y_mv = _by_xla(x.reshape(-1, x.shape[-1]), embedding_vd.T, jnp.float32)
  return y_mv.reshape(*x.shape[:-1], -1)


def _by_xla(x_md, w_df, preferred):
  return jnp.matmul(x_md, w_df.astype(x_md.dtype), preferred_element_type=preferred)
