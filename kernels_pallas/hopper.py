"""Grouped products with weights in words, as Mosaic GPU kernels for Hopper: what they share.

A program multiplies one tile of an expert's rows by COLUMNS of its outputs. Blocks of WORDS words
of those outputs come to shared memory; each of a block's parts, the same bits of all its words, is
decoded there as bfloat16 and multiplied by tensor cores. W^T is the left matrix, so that few rows
fill them.

The kernels are lowered and interpreted in tests and have not been run on a card: they serve where
the environment variable MOEJAX_GPU=mosaic asks for them, which is for Hopper cards alone (sm_90a).
"""

from collections.abc import Callable, Sequence
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MOST_ROWS = 64  # An expert. With more the products cost more than reading the weights.
COLUMNS = 64  # Outputs of a program, the least that tensor cores take as rows of W^T.
WORDS = 64  # Of an output in a block; as many inputs has a product.
ALIGNED = 8  # Words that are copied together.
TILES = (8, 16, 32)  # Rows of x that a program takes.
STAGES = 2  # Blocks of words and of x under way.
MOST_PARTS = 512  # Parts times rows: 128 KB of x in shared memory, of 227.


def unasked() -> str:
  """'' where kernels by Mosaic GPU are asked for, or why they do not serve.

  Raises:
    ValueError: MOEJAX_GPU is none of its values.
  """
  asked = os.environ.get('MOEJAX_GPU', '')
  if asked not in ('', 'xla', 'mosaic'):
    raise ValueError(f'MOEJAX_GPU={asked} is none of xla, mosaic')
  return '' if asked == 'mosaic' else 'MOEJAX_GPU=mosaic asks for kernels by Mosaic GPU'


def supports(m: int, f: int, e: int, dtype: Any) -> str:
  """'' if `products` takes m rows of `dtype`, e experts and f outputs, or why not."""
  if jnp.dtype(dtype) != jnp.bfloat16:
    return f'x is {jnp.dtype(dtype)}, the kernel multiplies bfloat16'
  if m > MOST_ROWS * e:
    return f'{m} rows of {e} experts, the kernel is for {MOST_ROWS} an expert at most'
  if f % COLUMNS:
    return f'{f} outputs, the kernel takes multiples of {COLUMNS}'
  return ''


class Tiles(NamedTuple):
  """Rows of x [m, d] in tiles that each belong to one expert.

  Attributes:
    row_ir: which rows; mine_ir: whether they are the tile's own.
    expert_i: int32, whose they are; -1: the tile is empty.
    tile_m, place_m: where each row is. expert_m: whose it is. inside_m: whether it is any expert's.
  """

  row_ir: jax.Array
  mine_ir: jax.Array
  expert_i: jax.Array
  tile_m: jax.Array
  place_m: jax.Array
  expert_m: jax.Array
  inside_m: jax.Array

  def of(self, x_md: jax.Array) -> jax.Array:
    """The tiles' rows [i, r, d], zeros where there is none."""
    return jnp.where(self.mine_ir[..., None], x_md[self.row_ir], 0)

  def rows(self, y_isfr: jax.Array) -> jax.Array:
    """[m, s, f] of what `products` gives, anything in rows of no expert."""
    return y_isfr[self.tile_m, :, :, self.place_m]


def tiles(m: int, group_sizes_e: jax.Array, parts: int) -> Tiles:
  """The tiles of m rows, the rows of group 0 first, for blocks of so many parts."""
  e = len(group_sizes_e)
  fitting = [t for t in TILES if t * parts <= MOST_PARTS]
  rows = next((t for t in fitting if t * e >= 2 * m), fitting[-1])
  ends_e = jnp.cumsum(group_sizes_e)
  each_e = -(-group_sizes_e // rows)
  tile_ends_e = jnp.cumsum(each_e)
  count = min(e, m) + m // rows
  tile_i, row_m = jnp.arange(count), jnp.arange(m)
  whose_i, whose_m = (
      jnp.searchsorted(ends, at, side='right').astype(jnp.int32)
      for ends, at in ((tile_ends_e, tile_i), (ends_e, row_m))
  )
  own_i, own_m = (jnp.minimum(whose, e - 1) for whose in (whose_i, whose_m))
  firsts_e, tile_firsts_e = ends_e - group_sizes_e, tile_ends_e - each_e
  row_ir = (firsts_e[own_i] + (tile_i - tile_firsts_e[own_i]) * rows)[:, None]
  row_ir = row_ir + jnp.arange(rows)[None]
  at_m = row_m - firsts_e[own_m]
  return Tiles(
      row_ir=jnp.clip(row_ir, 0, m - 1),
      mine_ir=(whose_i < e)[:, None] & (row_ir < ends_e[own_i][:, None]),
      expert_i=jnp.where(whose_i < e, whose_i, -1),
      tile_m=jnp.clip(tile_firsts_e[own_m] + at_m // rows, 0, count - 1), place_m=at_m % rows,
      expert_m=own_m, inside_m=whose_m < e,
  )


def products(
    x_ird: jax.Array, words_ewf: jax.Array, expert_i: jax.Array,
    decode: Callable[[jax.Array, int], Sequence[jax.Array]], *, parts: int, sums: int = 1,
    first: int = 0, interpret: Any = None,
) -> jax.Array:
  """x times the weights of words, float32 [tiles, sums, f, rows]; anything in empty tiles.

  Args:
    x_ird: bfloat16; d is in blocks of parts * WORDS: the inputs of part 0 of the block's words, of
      part 1, ... expert_i: the tiles' experts, -1 for none.
    decode: (uint32 [WORDS, COLUMNS], which part) to bfloat16 weights for each of the sums.
    first: the word that the first block begins with; words from there on are a multiple of
      ALIGNED. Those past the array's end meet zeros of x.
    interpret: `plgpu.InterpretGPUParams()` (JAX 0.12) runs it without a card.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu  # Half a second to import.

  count, rows, d = x_ird.shape
  f = words_ewf.shape[2]
  depth = parts * WORDS
  steps = d // depth
  swizzled = lambda bits: (plgpu.TilingTransform((8, 1024 // bits)), plgpu.SwizzleTransform(128))

  def step(totals, w_smem, _, words_smem, x_smem):
    words = words_smem[...]
    done = 0
    for part in range(parts):
      x_part = x_smem.at[:, pl.ds(part * WORDS, WORDS)]
      for total, weights in zip(totals, decode(words, part), strict=True):
        slot = w_smem.at[done % 2]
        slot[...] = weights
        plgpu.commit_smem()
        plgpu.wgmma(total, slot.transpose((1, 0)), x_part.transpose((1, 0)))
        plgpu.wgmma_wait(1)  # The other slot is free again.
        done += 1
    plgpu.wgmma_wait(0)

  def kernel(x_gmem, words_gmem, expert_gmem, y_gmem, y_smem, w_smem):
    column, tile = jax.lax.axis_index('column'), jax.lax.axis_index('tile')
    expert = expert_gmem[tile]

    def summed(*totals):
      plgpu.emit_pipeline(
          lambda *blocks: step(totals, w_smem, *blocks),
          grid=(steps,),
          in_specs=[
              plgpu.BlockSpec((WORDS, COLUMNS), lambda k: (k, column), transforms=swizzled(32)),
              plgpu.BlockSpec((rows, depth), lambda k: (0, k), transforms=swizzled(16)),
          ],
          max_concurrent_steps=min(STAGES, steps),
      )(words_gmem.at[expert, pl.ds(first, words_ewf.shape[1] - first)], x_gmem.at[tile])
      return tuple(total[...] for total in totals)

    @pl.when(expert >= 0)
    def _():
      totals = pl.run_scoped(summed, *[plgpu.ACC((COLUMNS, rows), jnp.float32)] * sums)
      for s, total in enumerate(totals):
        y_smem[s] = total
      plgpu.commit_smem()
      for s in range(sums):
        y_own = y_gmem.at[tile, s, pl.ds(column * COLUMNS, COLUMNS), :]
        plgpu.copy_smem_to_gmem(y_smem.at[s], y_own)
      plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
      kernel, out_type=jax.ShapeDtypeStruct((count, sums, f, rows), jnp.float32),
      grid=(f // COLUMNS, count), grid_names=('column', 'tile'),
      scratch_types={
          'y_smem': plgpu.SMEM((sums, COLUMNS, rows), jnp.float32),
          'w_smem': plgpu.SMEM((2, WORDS, COLUMNS), jnp.bfloat16, transforms=swizzled(16)),
      },
      interpret=interpret,
  )(x_ird, words_ewf, expert_i)
