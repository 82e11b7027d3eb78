"""The grouped products on GPU: XLA's `ragged_dot`, and JAX's Mosaic GPU kernels for Hopper.

`api` takes `ragged_dot`, which every GPU runs. The Mosaic kernels are here for whoever has measured
them on their own card; they want bfloat16 or float16 and axes that their blocks divide.
"""

from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 128
DEPTH = 64


def product(
    x_md: jax.Array, w_edf: jax.Array, group_sizes_e: jax.Array, *, transpose: bool = False
) -> jax.Array:
  """See `api.product`."""
  w = (w_edf.swapaxes(1, 2) if transpose else w_edf).astype(x_md.dtype)
  y_mf = jax.lax.ragged_dot(x_md, w, group_sizes_e, preferred_element_type=jnp.float32)
  return _zero_outside(y_mf, group_sizes_e).astype(x_md.dtype)


_OUTER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def outer(x_md: jax.Array, dy_mf: jax.Array, group_sizes_e: jax.Array, dtype: Any) -> jax.Array:
  """See `api.outer`."""
  return jax.lax.ragged_dot_general(
      x_md, dy_mf, group_sizes_e, _OUTER, preferred_element_type=jnp.float32
  ).astype(dtype)


def mosaic_product(
    x_md: jax.Array, w_edf: jax.Array, group_sizes_e: jax.Array, *, transpose: bool = False
) -> jax.Array:
  """`product` by the Mosaic GPU kernel (Hopper).

  Raises:
    ValueError: a dtype that is not bfloat16 or float16, or an axis that the blocks do not divide.
  """
  from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu  # Half a second to import.

  f = w_edf.shape[1 if transpose else 2]
  if x_md.dtype not in (jnp.bfloat16, jnp.float16):
    raise ValueError(f'mosaic_product: x is {x_md.dtype}, not bfloat16 or float16')
  if x_md.shape[1] % DEPTH or f % BLOCK:
    raise ValueError(
        f'mosaic_product: d = {x_md.shape[1]} must be a multiple of {DEPTH} and f = {f} of {BLOCK}'
    )
  y_mf = ragged_dot_mgpu.ragged_dot(
      x_md, w_edf.astype(x_md.dtype), group_sizes=group_sizes_e, block_m=BLOCK, block_n=BLOCK,
      block_k=DEPTH, max_concurrent_steps=4, grid_block_n=1, transpose_rhs=transpose,
  )
  return _zero_outside(y_mf, group_sizes_e)


def _zero_outside(y_mf: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
  inside = (jnp.arange(y_mf.shape[0]) < group_sizes_e.sum())[:, None]
  return jnp.where(inside, y_mf, jnp.zeros((), y_mf.dtype))
