"""The entry to the product: picks an implementation by platform and shapes, states its cost."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.lowrank_sparse_matmul import gpu, ref, tpu


class Cost(NamedTuple):
  """Bytes read and written and operations of one product."""

  bytes_moved: float
  flops: float


def lowrank_sparse_matmul(
    x_md: jax.Array, left_edr: jax.Array, right_erf: jax.Array, kept_eds: jax.Array,
    index_es: jax.Array, group_sizes_e: jax.Array,
) -> jax.Array:
  """[m, f] in x's dtype, accumulated in float32; see the package.

  Raises:
    ValueError: shapes that do not fit.
  """
  (m, d), (e, r, f), s = x_md.shape, right_erf.shape, index_es.shape[1]
  fits = (
      left_edr.shape == (e, d, r) and kept_eds.shape == (e, d, s) and index_es.shape == (e, s)
      and group_sizes_e.shape == (e,)
  )
  if not fits:
    raise ValueError(
        f'lowrank_sparse_matmul: x {x_md.shape}, left {left_edr.shape}, right {right_erf.shape}, '
        f'kept {kept_eds.shape}, index {index_es.shape} and group sizes {group_sizes_e.shape} do '
        'not fit'
    )
  if not (m and e):
    return jnp.zeros((m, f), x_md.dtype)
  refused = tpu.supports(m, d, f, r, s, e, x_md.dtype, left_edr.dtype)
  return jax.lax.platform_dependent(
      x_md, left_edr, right_erf, kept_eds, index_es, group_sizes_e,
      cpu=ref.lowrank_sparse_matmul,
      tpu=gpu.lowrank_sparse_matmul if refused else tpu.lowrank_sparse_matmul,
      default=gpu.lowrank_sparse_matmul,
  )


def expand(
    low_mr: jax.Array, kept_ms: jax.Array, right_erf: jax.Array, index_es: jax.Array,
    group_sizes_e: jax.Array,
) -> jax.Array:
  """low right, plus the kept outputs where they belong: [m, f] in low's dtype.

  For kept columns that are not an array: low = x left and kept = x S' are made already.
  """
  m, (e, r, f), s = low_mr.shape[0], right_erf.shape, index_es.shape[1]
  if not (m and e):
    return jnp.zeros((m, f), low_mr.dtype)
  refused = tpu.supports(m, r, f, r, s, e, low_mr.dtype, right_erf.dtype)
  return jax.lax.platform_dependent(
      low_mr, kept_ms, right_erf, index_es, group_sizes_e, cpu=ref.expand,
      tpu=gpu.expand if refused else tpu.expand, default=gpu.expand,
  )


def cost(m: int, d: int, f: int, r: int, s: int, active_groups: int, itemsize: int) -> Cost:
  """What one product moves and does: each expert with rows once, x and y once.

  bytes = active (itemsize (r (d + f) + s d) + 4 s) + itemsize m (d + f).
  """
  weights = r * (d + f) + s * d
  return Cost(
      bytes_moved=active_groups * (itemsize * weights + 4 * s) + itemsize * m * (d + f),
      flops=2.0 * m * weights,
  )
