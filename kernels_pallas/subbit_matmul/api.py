"""The entry to the product: picks an implementation by platform and shapes, states its cost."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import extension
from kernels_pallas.subbit_matmul import cpu, gpu, layout, ref, tpu


class Cost(NamedTuple):
  """Bytes read and written and operations of one product."""

  bytes_moved: float
  flops: float


def subbit_matmul(
    x_md: jax.Array, rows_rl: jax.Array, starts_es: jax.Array, records_es1w: jax.Array,
    levels_enc: jax.Array, homes_etl: jax.Array, group_sizes_e: jax.Array, sizes: layout.Sizes,
) -> jax.Array:
  """y[rows of e] = x[rows of e] W_e, [m, f] in x's dtype, accumulated in float32.

  The kernel on TPU, where it `supports` the product; C++ on CPU, or loops in XLA where it was not
  built; else expanded experts.

  See the package for the arguments.

  Raises:
    ValueError: shapes that do not fit.
  """
  (m, d), (e, n, columns) = x_md.shape, levels_enc.shape
  tiles = sizes.tiles
  fits = (
      d == sizes.d and rows_rl.shape[1:] == (layout.LANES,) and n in (1, 2)
      and columns == tiles * layout.LANES and starts_es.shape == (e, sizes.strips)
      and records_es1w.shape == (e, sizes.strips, 1, sizes.record)
      and homes_etl.shape == (e, tiles, layout.LANES) and group_sizes_e.shape == (e,)
  )
  if not fits:
    raise ValueError(
        f'subbit_matmul: x {x_md.shape}, rows {rows_rl.shape}, starts {starts_es.shape}, records '
        f'{records_es1w.shape}, levels {levels_enc.shape}, homes {homes_etl.shape} and group sizes '
        f'{group_sizes_e.shape} do not fit {sizes}'
    )
  if not (m and e):
    return jnp.zeros((m, sizes.f), x_md.dtype)
  by_cpu = ref if extension.missing() else cpu
  on_cpu, on_tpu, expanded = (
      functools.partial(f.subbit_matmul, sizes=sizes) for f in (by_cpu, tpu, gpu)
  )
  return jax.lax.platform_dependent(
      x_md, rows_rl, starts_es, records_es1w, levels_enc, homes_etl, group_sizes_e, cpu=on_cpu,
      tpu=expanded if tpu.supports(m, e, sizes, x_md.dtype) else on_tpu, default=expanded,
  )


def cost(
    m: int, sizes: layout.Sizes, active_groups: int, bits_per_weight: float, itemsize: int
) -> Cost:
  """What one product moves and does: the codes of each expert with rows once, x and y once.

  bytes = active d f bits / 8 + itemsize m (d + f); flops = 2 m d f.
  """
  weights = sizes.d * sizes.f
  codes, rows = active_groups * weights * bits_per_weight / 8, m * (sizes.d + sizes.f)
  return Cost(bytes_moved=codes + itemsize * rows, flops=2.0 * m * weights)
