"""The entry to the grouped products: picks an implementation by platform, states its cost."""

from typing import Any, NamedTuple

import jax

from kernels_pallas import extension, hopper
from kernels_pallas.grouped_matmul import cpu, gpu, ref, tpu


class Cost(NamedTuple):
  """Bytes read and written and operations of one product."""

  bytes_moved: float
  flops: float


def product(
    x_md: jax.Array, w_edf: jax.Array, group_sizes_e: jax.Array, *, transpose: bool = False
) -> jax.Array:
  """y[rows of e] = x[rows of e] w[e], [m, f] in x's dtype, accumulated in float32.

  With `transpose` w is [e, f, d] and y = x w[e]^T. Rows past the sum of the sizes give 0.

  Raises:
    ValueError: shapes that do not fit.
  """
  (m, d), f = x_md.shape, w_edf.shape[1 if transpose else 2]
  if w_edf.shape[2 if transpose else 1] != d or group_sizes_e.shape != w_edf.shape[:1]:
    raise ValueError(
        f'grouped product: x {x_md.shape}, w {w_edf.shape}{" transposed" if transpose else ""} and '
        f'group sizes {group_sizes_e.shape} do not fit'
    )
  own = gpu if tpu.supports(m, d, f, len(w_edf)) else tpu
  on_cpu = ref if extension.without(x_md.dtype, w_edf.dtype) else cpu
  by_xla = hopper.unasked() or gpu.supports(m, d, f, x_md.dtype)
  on_cuda = gpu.product if by_xla else gpu.mosaic_product
  return jax.lax.platform_dependent(
      x_md, w_edf, group_sizes_e,
      cpu=lambda x, w, sizes: on_cpu.product(x, w, sizes, transpose=transpose),
      tpu=lambda x, w, sizes: own.product(x, w, sizes, transpose=transpose),
      cuda=lambda x, w, sizes: on_cuda(x, w, sizes, transpose=transpose),
      default=lambda x, w, sizes: gpu.product(x, w, sizes, transpose=transpose),
  )


def outer(x_md: jax.Array, dy_mf: jax.Array, group_sizes_e: jax.Array, dtype: Any) -> jax.Array:
  """dw[e] = x[rows of e]^T dy[rows of e], [e, d, f] in `dtype`, accumulated in float32.

  Raises:
    ValueError: shapes that do not fit.
  """
  (m, d), f = x_md.shape, dy_mf.shape[1]
  if len(dy_mf) != m:
    raise ValueError(f'grouped outer product: x {x_md.shape} and dy {dy_mf.shape} do not fit')
  own = gpu if tpu.supports(m, d, f, len(group_sizes_e)) else tpu
  on_cpu = ref if extension.without(x_md.dtype, dy_mf.dtype, dtype) else cpu
  return jax.lax.platform_dependent(
      x_md, dy_mf, group_sizes_e,
      cpu=lambda x, dy, sizes: on_cpu.outer(x, dy, sizes, dtype),
      tpu=lambda x, dy, sizes: own.outer(x, dy, sizes, dtype),
      default=lambda x, dy, sizes: gpu.outer(x, dy, sizes, dtype),
  )


def cost(m: int, d: int, f: int, active_groups: int, itemsize: int) -> Cost:
  """What one product moves and does, whatever the number of groups without rows.

  flops = 2 m d f; bytes = itemsize (m d + active d f + m f).
  """
  return Cost(
      bytes_moved=itemsize * (m * d + active_groups * d * f + m * f), flops=2.0 * m * d * f
  )
