"""The grouped products in C++ for CPUs: blocks of matrices laid out for the cache, then multiplied.

Groups have just the rows they have: nothing is padded, and a group's few rows read its matrix once,
where it lies.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import extension


def product(
    x_md: jax.Array, w_edf: jax.Array, group_sizes_e: jax.Array, *, transpose: bool = False,
    dtype: Any = None,
) -> jax.Array:
  """See `api.product`; in `dtype`, by default x's."""
  shape = (x_md.shape[0], w_edf.shape[1 if transpose else 2])
  out = jax.ShapeDtypeStruct(shape, dtype or x_md.dtype)
  call = extension.call(extension.GROUPED_PRODUCT, out)
  return call(x_md, w_edf, group_sizes_e, transpose=transpose)


def outer(x_md: jax.Array, dy_mf: jax.Array, group_sizes_e: jax.Array, dtype: Any) -> jax.Array:
  """See `api.outer`."""
  out = jax.ShapeDtypeStruct((len(group_sizes_e), x_md.shape[1], dy_mf.shape[1]), dtype)
  call = extension.call(extension.GROUPED_OUTER, out)
  return call(x_md, dy_mf, group_sizes_e)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def matmul(x_md: jax.Array, w_df: jax.Array, dtype: Any) -> jax.Array:
  """x w in `dtype`, [m, f], for few rows; both modes of differentiation go by XLA."""
  rows_1 = jnp.full(1, x_md.shape[0], jnp.int32)
  return product(x_md, w_df[None], rows_1, dtype=dtype)


@matmul.defjvp
def _matmul_jvp(dtype, primals, tangents):
  (x_md, w_df), (dx_md, dw_df) = primals, tangents
  by_xla = functools.partial(jnp.matmul, preferred_element_type=dtype)
  return matmul(x_md, w_df, dtype), by_xla(dx_md, w_df) + by_xla(x_md, dw_df)
