"""The product on TPU (Mosaic): words are masked into bfloat16 weights beside the matrix unit.

A tile of words is decoded a chunk at a time, one shift and one mask a register of two weights, and
multiplied at once; two levels take a second product with the weights' magnitudes. float32 rows are
three bfloat16 rows in the same product, which is exact to float32 since the weights are.
"""

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata
import jax.numpy as jnp

from kernels_pallas.ternary_matmul import layout

ROWS = 16  # Rows of a bfloat16 register.
MOST_ROWS = 128
MOST_CHUNKS = 16


def supports(m: int, d: int, f: int, e: int, dtype: Any) -> str:
  """Why the kernel does not take a product; '' if it does."""
  if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
    return f'x is {jnp.dtype(dtype)}, not bfloat16 or float32'
  if not (m and d and f and e):
    return f'nothing to multiply: m = {m}, d = {d}, f = {f}, {e} experts'
  return ''


def depth(d: int) -> int:
  """Chunks a tile: all, if they are few, else as many as leave the least of the last one empty."""
  chunks = -(-d // layout.CHUNK)
  if chunks <= MOST_CHUNKS:
    return chunks
  return min(range(MOST_CHUNKS, MOST_CHUNKS // 2 - 1, -1), key=lambda n: -chunks % n)


def width(f: int, rows: int) -> int:
  """Outputs a tile: a wide one is set up less often, and has its sums of few rows in registers."""
  return min(f, 1024 if rows <= 3 * ROWS else 512)


def weights(words: jax.Array, mask: Any) -> jax.Array:
  """A chunk's words [16, n] as bfloat16 [256, n]: 0, 2.0, -2.0, or their magnitudes."""
  words = jax.lax.bitcast_convert_type(words, jnp.uint32)
  pairs = [(words << jnp.uint32(2 * i)) & jnp.uint32(mask) for i in range(layout.STEPS)]
  return jnp.concatenate([pltpu.bitcast(p, jnp.bfloat16) for p in pairs])


def _tile_sum(x_ref: Any, words_ref: Any, mask: Any) -> jax.Array:
  """x by the weights that the mask leaves of a tile's words: float32 [rows of x, columns]."""
  total: Any = None
  for c in range(words_ref.shape[0] // layout.WORDS):
    words = words_ref[c * layout.WORDS : (c + 1) * layout.WORDS, :]
    x = x_ref[:, c * layout.CHUNK : (c + 1) * layout.CHUNK]
    part = jnp.dot(x, weights(words, mask), preferred_element_type=jnp.float32)
    total = part if total is None else total + part
  return total


def with_levels(sums: list[jax.Array], levels: jax.Array, parts: int) -> jax.Array:
  """[rows, n] of the sums by weights and by magnitudes, [parts * rows, n]; levels [1 or 2, n]."""
  # high = (a + b) UNIT, low = (b - a) UNIT; of symmetric ones b is 0.
  high = levels[-1:]
  low = levels[0:1] if len(sums) == 2 else -high
  factors = [(high - low) / (2 * layout.UNIT), (high + low) / (2 * layout.UNIT)]
  rows = sums[0].shape[0] // parts
  y: Any = None
  for every, factor in zip(sums, factors):
    total = every[0:rows]
    for part in range(1, parts):
      total += every[part * rows : (part + 1) * rows]
    y = total * factor if y is None else y + total * factor
  return y


def own_rows(
    offsets_ref: Any, groups_ref: Any, tiles_ref: Any, shape: tuple[int, ...], *, visit: Any
) -> jax.Array:
  """Which rows of a visit's tile of rows are its expert's."""
  row = tiles_ref[visit] * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  group = groups_ref[visit]
  return (row >= offsets_ref[group]) & (row < offsets_ref[group + 1])


def _kernel(
    offsets_ref, groups_ref, tiles_ref, x_ref, words_ref, levels_ref, y_ref, *sums, parts: int
):
  visit, k = pl.program_id(1), pl.program_id(2)

  @pl.when(k == 0)
  def _():
    for sum_ref in sums:
      sum_ref[...] = jnp.zeros_like(sum_ref)

  for sum_ref, mask in zip(sums, (layout.BOTH, layout.EXPONENTS)):
    sum_ref[...] += _tile_sum(x_ref, words_ref, mask)

  @pl.when(k == pl.num_programs(2) - 1)
  def _():
    y = with_levels([sum_ref[...] for sum_ref in sums], levels_ref[...], parts)
    own = own_rows(offsets_ref, groups_ref, tiles_ref, y.shape, visit=visit)
    y_ref[...] = jnp.where(own, y, y_ref[...].astype(jnp.float32)).astype(y_ref.dtype)


def bfloat16_parts(x_md: jax.Array, rows: int) -> tuple[jax.Array, int]:
  """bfloat16 rows that add up to x's, each tile's together: [tiles * parts * rows, d]."""
  if x_md.dtype == jnp.bfloat16:
    return x_md, 1
  left, parts = x_md, []
  for _ in range(3):
    # The barrier keeps XLA from taking a float32 for its own rounding.
    parts.append(jax.lax.optimization_barrier(left.astype(jnp.bfloat16)))
    left = left - parts[-1].astype(jnp.float32)
  stacked = jnp.stack([p.reshape(-1, rows, x_md.shape[1]) for p in parts], axis=1)
  return stacked.reshape(-1, x_md.shape[1]), 3


@functools.partial(jax.jit, static_argnames=('interpret',))
def ternary_matmul(
    x_md: jax.Array, words_ewf: jax.Array, levels_enf: jax.Array, group_sizes_e: jax.Array, *,
    interpret: bool = False,
) -> jax.Array:
  """See `api.ternary_matmul`."""
  (m, d), (e, w, f), levels = x_md.shape, words_ewf.shape, levels_enf.shape[1]
  rows = min(MOST_ROWS, -(-m // ROWS) * ROWS)
  chunks = depth(d)
  deep, tiles_k = chunks * layout.CHUNK, -(-w // (chunks * layout.WORDS))
  total_m = -(-m // rows) * rows
  x_md = jnp.pad(x_md, ((0, total_m - m), (0, tiles_k * deep - d)))
  sizes = group_sizes_e.astype(jnp.int32)
  (offsets, groups, tiles), visits = make_group_metadata(
      group_sizes=sizes, m=total_m, tm=rows, start_group=jnp.int32(0), num_nonzero_groups=e,
      visit_empty_groups=False,
  )
  x_parts, parts = bfloat16_parts(x_md, rows)
  tall = parts * rows
  wide = width(f, tall)
  made = pl.pallas_call(
      functools.partial(_kernel, parts=parts),
      out_shape=jax.ShapeDtypeStruct((total_m, f), x_md.dtype),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=3,
          grid=(-(-f // wide), visits, tiles_k),
          in_specs=[
              pl.BlockSpec((tall, deep), lambda n, v, k, offsets, groups, tiles: (tiles[v], k)),
              pl.BlockSpec(
                  (None, chunks * layout.WORDS, wide),
                  lambda n, v, k, offsets, groups, tiles: (groups[v], k, n),
              ),
              pl.BlockSpec(
                  (None, levels, wide), lambda n, v, k, offsets, groups, tiles: (groups[v], 0, n)
              ),
          ],
          out_specs=pl.BlockSpec(
              (rows, wide), lambda n, v, k, offsets, groups, tiles: (tiles[v], n)
          ),
          scratch_shapes=[pltpu.VMEM((tall, wide), jnp.float32)] * levels,
      ),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary', 'arbitrary')
      ),
      interpret=interpret,
      name='ternary_matmul',
  )(offsets, groups, tiles, x_parts, words_ewf, levels_enf.astype(jnp.float32))
  inside = (jnp.arange(m) < sizes.sum())[:, None]
  return jnp.where(inside, made[:m], jnp.zeros((), made.dtype))
