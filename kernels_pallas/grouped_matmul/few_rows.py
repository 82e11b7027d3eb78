"""One matrix and a few rows, as in decoding, in C++ for CPUs: the matrix is read once, in place."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import extension
from kernels_pallas.grouped_matmul import cpu

# Rows that the widest vectors take in one pass over the matrix.
MOST = 14


def supports(x_md: jax.Array, w_df: jax.Array, dtype: Any) -> str:
  """'' if `matmul` takes these and is worth it, or why not."""
  if not 0 < len(x_md) <= MOST:
    return f'{len(x_md)} rows, it is for 1 to {MOST}'
  if x_md.dtype != w_df.dtype:
    return f'x is {x_md.dtype} and the matrix {w_df.dtype}'
  if jax.device_count() > 1:
    return 'XLA cannot divide a foreign call over devices'
  return extension.without(x_md.dtype, dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def matmul(x_md: jax.Array, w_df: jax.Array, dtype: Any) -> jax.Array:
  """x w in `dtype`, [m, f]. Derivatives, and batches of products, go by XLA."""

  @jax.custom_batching.custom_vmap
  def foreign(x_md, w_df):
    return cpu.product(x_md, w_df[None], jnp.full(1, len(x_md), jnp.int32), dtype=dtype)

  @foreign.def_vmap
  def batched(axis_size, in_batched, x, w):
    del axis_size, in_batched
    return _by_xla(x, w, dtype), True

  return foreign(x_md, w_df)


def _by_xla(x, w, dtype):
  return jnp.matmul(x, w, preferred_element_type=dtype)


@functools.partial(matmul.defjvp, symbolic_zeros=True)
def _jvp(dtype, primals, tangents):
  (x_md, w_df), (dx_md, dw_df) = primals, tangents
  y_mf = matmul(x_md, w_df, dtype)
  is_zero = lambda a: isinstance(a, jax.custom_derivatives.SymbolicZero)
  terms = [] if is_zero(dx_md) else [_by_xla(dx_md, w_df, dtype)]
  if not is_zero(dw_df):
    terms.append(_by_xla(x_md, dw_df, dtype))
  return y_mf, functools.reduce(jnp.add, terms, jnp.zeros_like(y_mf))
