"""The grouped products on TPU by JAX's megablox kernels, for any number of rows and any sizes.

A row tile that holds rows of two groups is visited once for each; a group without rows is not
visited at all. So the work is the tokens' and at most one tile more for each group.
"""

from typing import Any

import jax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
import jax.numpy as jnp

# One operand tile, its double buffer, the output and the float32 sum fit the 16 MiB of vector
# memory that a TPU v5e gives a kernel.
_TILE_BYTES = 1024
_ROW_TILES = (512, 256, 128)


def supports(m: int, d: int, f: int, e: int) -> str:
  """Why the kernels do not take a product; '' if they do, whatever the dtype."""
  if not (m and d and f and e):
    return f'nothing to multiply: m = {m}, d = {d}, f = {f}, {e} experts'
  return ''


def supported(dtype: Any) -> bool:
  """Whether it is multiplied as it is; other dtypes are in float32."""
  return jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


def tile(size: int, limit: int) -> int:
  """The tile of an axis: all, else the widest that divides it, else half the limit (masks cost)."""
  if size <= limit:
    return size
  exact = [t for t in range(limit, 127, -128) if size % t == 0]
  return exact[0] if exact and exact[0] >= limit // 2 else limit // 2


def lane_tile(size: int, limit: int) -> int:
  """All of an axis up to `limit`, a multiple of 128; else the most 128s that divide it.

  Where none divide it, the limit: the last tile is partly empty, and has to be masked.
  """
  if size <= limit:
    return size
  exact = [n for n in range(limit, 127, -128) if size % n == 0]
  return exact[0] if exact else limit


def row_tile(rows: int, groups: int) -> int:
  """Rows a tile: the largest that a group's mean share fills, so that few tiles are shared."""
  for t in _ROW_TILES:
    if rows >= t * groups:
      return t
  return _ROW_TILES[-1]


def tiling(rows: int, groups: int, d: int, f: int, dtype: Any) -> tuple[int, int, int]:
  """Rows, inputs and outputs of a tile."""
  limit = 2 * _TILE_BYTES // jnp.dtype(dtype).itemsize
  return row_tile(rows, groups), tile(d, limit), tile(f, limit)


def _padded(x: jax.Array, rows: int) -> jax.Array:
  return jnp.pad(x, ((0, -x.shape[0] % rows), (0, 0)))


def product(
    x_md: jax.Array, w_edf: jax.Array, group_sizes_e: jax.Array, *, transpose: bool = False,
    interpret: bool = False,
) -> jax.Array:
  """See `api.product`; x in bfloat16 or float32 (another dtype is multiplied in float32)."""
  m, dtype = x_md.shape[0], x_md.dtype
  kernel_dtype = dtype if supported(dtype) else jnp.float32
  f = w_edf.shape[1 if transpose else 2]
  tiles = tiling(m, w_edf.shape[0], x_md.shape[1], f, kernel_dtype)
  y_mf = gmm(
      _padded(x_md, tiles[0]).astype(kernel_dtype), w_edf.astype(kernel_dtype),
      group_sizes_e.astype(jnp.int32), kernel_dtype, tiles, transpose_rhs=transpose,
      interpret=interpret,
  )[:m]
  inside = (jnp.arange(m) < group_sizes_e.sum())[:, None]
  return jnp.where(inside, y_mf, 0).astype(dtype)


def outer(
    x_md: jax.Array, dy_mf: jax.Array, group_sizes_e: jax.Array, dtype: Any, *,
    interpret: bool = False,
) -> jax.Array:
  """See `api.outer`."""
  kernel_dtype = x_md.dtype if supported(x_md.dtype) else jnp.float32
  groups = group_sizes_e.shape[0]
  tiles = tiling(x_md.shape[0], groups, x_md.shape[1], dy_mf.shape[1], kernel_dtype)
  out = dtype if supported(dtype) else jnp.float32
  return tgmm(
      _padded(x_md, tiles[0]).astype(kernel_dtype).swapaxes(0, 1),
      _padded(dy_mf, tiles[0]).astype(kernel_dtype),
      group_sizes_e.astype(jnp.int32), out, tiles, interpret=interpret,
  ).astype(dtype)
