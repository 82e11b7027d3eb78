"""The grouped products on GPU: XLA's `ragged_dot`, and JAX's Mosaic GPU kernels for Hopper.

`api` takes `ragged_dot`, which every GPU runs, and the Mosaic kernel where `kernels_pallas.hopper`
says that it is asked for; that wants bfloat16 or float16 and axes that its blocks divide.
"""

from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 128
DEPTH = 64
ROWS = 8  # The Mosaic kernel takes multiples of them.


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


def supports(m: int, d: int, f: int, dtype: Any) -> str:
  """'' if `mosaic_product` takes such a product, or why not."""
  if not m:
    return 'm = 0'
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f'x is {dtype}, not bfloat16 or float16'
  if d % DEPTH or f % BLOCK:
    return f'd = {d} must be a multiple of {DEPTH} and f = {f} of {BLOCK}'
  return ''


def mosaic_product(
    x_md: jax.Array, w_edf: jax.Array, group_sizes_e: jax.Array, *, transpose: bool = False
) -> jax.Array:
  """`product` by the Mosaic GPU kernel (Hopper).

  Raises:
    ValueError: a dtype that is not bfloat16 or float16, or an axis that the blocks do not divide.
  """
  from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu  # Half a second to import.

  (m, d), f = x_md.shape, w_edf.shape[1 if transpose else 2]
  if reason := supports(m, d, f, x_md.dtype):
    raise ValueError(f'mosaic_product: {reason}')
  x_md = jnp.pad(x_md, ((0, -m % ROWS), (0, 0)))
  y_mf = ragged_dot_mgpu.ragged_dot(
      x_md, w_edf.astype(x_md.dtype), group_sizes=group_sizes_e, block_m=BLOCK, block_n=BLOCK,
      block_k=DEPTH, max_concurrent_steps=4, grid_block_n=1, transpose_rhs=transpose,
  )
  return _zero_outside(y_mf[:m], group_sizes_e)


def _zero_outside(y_mf: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
  inside = (jnp.arange(y_mf.shape[0]) < group_sizes_e.sum())[:, None]
  return jnp.where(inside, y_mf, jnp.zeros((), y_mf.dtype))
