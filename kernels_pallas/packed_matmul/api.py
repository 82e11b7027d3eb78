"""The entry to the product: picks an implementation by platform and shapes, states its cost."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import extension, hopper
from kernels_pallas.packed_matmul import cpu, gpu, layout, ref, tpu


class Cost(NamedTuple):
  """Bytes read and written and operations of one product."""

  bytes_moved: float
  flops: float


def packed_matmul(
    x_md: jax.Array, words_ewf: jax.Array, scale_efg: jax.Array, zero_efg: jax.Array,
    group_sizes_e: jax.Array, *, bits: int, group_size: int = 0,
) -> jax.Array:
  """y[rows of e] = x[rows of e] W_e, [m, f] in x's dtype, accumulated in float32.

  The kernel on TPU, and on an NVIDIA card where MOEJAX_GPU=mosaic asks for it, if it `supports` the
  product; C++ on CPU, or loops in XLA where it was not built; else expanded experts.

  See the package for the arguments.

  Raises:
    ValueError: shapes that do not fit.
  """
  (m, d), (e, w, f) = x_md.shape, words_ewf.shape
  levels = (e, f, layout.groups(d, group_size))
  fits = (
      w == layout.words_per_column(d, bits) and scale_efg.shape == zero_efg.shape == levels
      and group_sizes_e.shape == (e,)
  )
  if not fits:
    raise ValueError(
        f'packed_matmul: x {x_md.shape}, {bits}-bit words {words_ewf.shape}, scale '
        f'{scale_efg.shape}, zero {zero_efg.shape} and group sizes {group_sizes_e.shape} do not '
        f'fit'
    )
  if not (m and e):
    return jnp.zeros((m, f), x_md.dtype)
  refused = tpu.supports(m, d, f, e, x_md.dtype, bits, group_size)
  of_width = functools.partial(functools.partial, bits=bits, group_size=group_size)
  plain = of_width(gpu.packed_matmul)
  by_cpu = ref if extension.without(x_md.dtype) else cpu
  by_xla = hopper.unasked() or gpu.supports(m, d, f, e, x_md.dtype, bits, group_size)
  return jax.lax.platform_dependent(
      x_md, words_ewf, scale_efg, zero_efg, group_sizes_e,
      cpu=of_width(by_cpu.packed_matmul), tpu=plain if refused else of_width(tpu.packed_matmul),
      cuda=plain if by_xla else of_width(gpu.mosaic_packed_matmul), default=plain,
  )


def cost(
    m: int, d: int, f: int, active_groups: int, bits: int, itemsize: int, *, group_size: int = 0,
    level_itemsize: int = 2,
) -> Cost:
  """What one product moves and does: each expert with rows once, x and y once.

  bytes = active (4 words(d) + 2 level bytes groups) f + itemsize m (d + f); flops = 2 m d f.
  """
  expert = 4 * layout.words_per_column(d, bits) + 2 * level_itemsize * layout.groups(d, group_size)
  return Cost(
      bytes_moved=active_groups * expert * f + itemsize * m * (d + f), flops=2.0 * m * d * f
  )
