"""The entry to the product: picks an implementation by platform and shapes, states its cost."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import extension, hopper
from kernels_pallas.ternary_matmul import cpu, gpu, layout, ref, tpu


class Cost(NamedTuple):
  """Bytes read and written and operations of one product."""

  bytes_moved: float
  flops: float


def ternary_matmul(
    x_md: jax.Array, words_ewf: jax.Array, levels_enf: jax.Array, group_sizes_e: jax.Array
) -> jax.Array:
  """y[rows of e] = x[rows of e] W_e, [m, f] in x's dtype, accumulated in float32.

  The kernel on TPU, and on an NVIDIA card where MOEJAX_GPU=mosaic asks for it, if it `supports` the
  product; C++ on CPU, or loops in XLA where it was not built; else expanded experts.

  See the package for the arguments. One level an output halves the kernel's products.

  Raises:
    ValueError: shapes that do not fit.
  """
  (m, d), (e, _, f) = x_md.shape, words_ewf.shape
  fits = (
      words_ewf.shape[1] == layout.words_of(d) and levels_enf.shape in ((e, 1, f), (e, 2, f))
      and group_sizes_e.shape == (e,)
  )
  if not fits:
    raise ValueError(
        f'ternary_matmul: x {x_md.shape}, words {words_ewf.shape}, levels {levels_enf.shape} and '
        f'group sizes {group_sizes_e.shape} do not fit'
    )
  if not (m and e):
    return jnp.zeros((m, f), x_md.dtype)
  refused = tpu.supports(m, d, f, e, x_md.dtype)
  by_cpu = ref if extension.without(x_md.dtype) else cpu
  by_xla = hopper.unasked() or hopper.supports(m, f, e, x_md.dtype)
  return jax.lax.platform_dependent(
      x_md, words_ewf, levels_enf, group_sizes_e, cpu=by_cpu.ternary_matmul,
      tpu=gpu.ternary_matmul if refused else tpu.ternary_matmul,
      cuda=gpu.ternary_matmul if by_xla else gpu.mosaic_ternary_matmul, default=gpu.ternary_matmul,
  )


def cost(m: int, d: int, f: int, active_groups: int, levels: int, itemsize: int) -> Cost:
  """What one product moves and does: words and levels of each expert with rows once, x and y once.

  bytes = active (4 words(d) + 2 levels) f + itemsize m (d + f); flops = 2 m d f.
  """
  expert = (4 * layout.words_of(d) + 2 * levels) * f
  return Cost(
      bytes_moved=active_groups * expert + itemsize * m * (d + f), flops=2.0 * m * d * f
  )
