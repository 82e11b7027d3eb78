"""The grouped products in C++ for CPUs: blocks of matrices laid out for the cache, then multiplied.

Groups have just the rows they have: nothing is padded, and a group's few rows read its matrix once,
where it lies.
"""

from typing import Any

import jax

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
