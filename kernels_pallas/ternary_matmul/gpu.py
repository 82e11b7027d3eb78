"""The product on GPUs: expanded experts by XLA, and a Mosaic GPU kernel for Hopper.

`api` takes the kernel where `kernels_pallas.hopper` says that it is asked for: it is interpreted
and lowered in tests and has not been run on a card.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.grouped_matmul import ref as grouped
from kernels_pallas.ternary_matmul import layout

MOST_ROWS = 512  # With more the products cost more than reading the weights.
COLUMNS = 64  # Outputs of a program, the least that tensor cores take as rows of W^T.
INPUTS = 64  # Of a product; as many words of a column are read at a time.
STEP = INPUTS * layout.CHUNK // layout.WORDS  # Inputs of so many words.
TILES = (8, 16, 32)  # Rows of x that a program takes.
STAGES = 2  # Blocks of words and of x under way.
SIGN_AND_EXPONENT, EXPONENT = np.uint32(0xC0000000), np.uint32(0x40000000)


def ternary_matmul(
    x_md: jax.Array, words_ewf: jax.Array, levels_enf: jax.Array, group_sizes_e: jax.Array
) -> jax.Array:
  """See `api.ternary_matmul`: one expert at a time is expanded, used for its rows and dropped."""
  pick = lambda a, e: jax.lax.dynamic_index_in_dim(a, e, 0, keepdims=False)
  return grouped.grouped_matmul(
      x_md,
      lambda e, _: layout.dense(pick(words_ewf, e), pick(levels_enf, e), x_md.shape[1], x_md.dtype),
      group_sizes_e, words_ewf.shape[2],
  )


def supports(m: int, f: int, dtype: Any) -> str:
  """'' if `mosaic_ternary_matmul` takes such a product, or why not."""
  if jnp.dtype(dtype) != jnp.bfloat16:
    return f'x is {jnp.dtype(dtype)}, the kernel multiplies bfloat16'
  if m > MOST_ROWS:
    return f'{m} rows, the kernel is for {MOST_ROWS} at most'
  if f % COLUMNS:
    return f'{f} outputs, the kernel takes multiples of {COLUMNS}'
  return ''


def mosaic_ternary_matmul(
    x_md: jax.Array, words_ewf: jax.Array, levels_enf: jax.Array, group_sizes_e: jax.Array, *,
    interpret: Any = None,
) -> jax.Array:
  """See `api.ternary_matmul`: by a kernel whose products are of signs, and of sizes for two levels.

  With s the signs and a = |s|, W = s (high - low) / 2 + a (high + low) / 2. A program multiplies
  one tile of an expert's rows by COLUMNS of its outputs; W^T is the left matrix, so that few rows
  fill the tensor cores.

  Args:
    interpret: `plgpu.InterpretGPUParams()` (JAX 0.12) runs it without a card.

  Raises:
    ValueError: what `supports` does not take.
  """
  m, (e, w, f) = len(x_md), words_ewf.shape
  if reason := supports(m, f, x_md.dtype):
    raise ValueError(f'mosaic_ternary_matmul: {reason}')
  rows = next((t for t in TILES if t * e >= 2 * m), TILES[-1])
  starts_e = jnp.cumsum(group_sizes_e) - group_sizes_e
  each_e = -(-group_sizes_e // rows)
  ends_e = jnp.cumsum(each_e)
  tile_i = jnp.arange(min(e, m) + m // rows)
  expert_i = jnp.searchsorted(ends_e, tile_i, side='right')
  own_i = jnp.minimum(expert_i, e - 1)
  row_it = (starts_e + (each_e - ends_e) * rows)[own_i][:, None] + tile_i[:, None] * rows
  row_it = row_it + jnp.arange(rows)[None]
  mine_it = (expert_i < e)[:, None] & (row_it < (starts_e + group_sizes_e)[own_i][:, None])
  x_itd = jnp.where(mine_it[..., None], x_md[jnp.clip(row_it, 0, m - 1)], 0)
  experts_i = jnp.where(expert_i < e, expert_i, -1).astype(jnp.int32)
  products_infr = _products(
      _arranged(x_itd, w), words_ewf, experts_i, levels_enf.shape[1], interpret
  )

  row_m = jnp.arange(m)
  expert_m = jnp.minimum(
      jnp.searchsorted(starts_e + group_sizes_e, row_m, side='right'), e - 1
  )
  at_m = row_m - starts_e[expert_m]
  tile_m = (ends_e - each_e)[expert_m] + at_m // rows
  sums_mnf = products_infr[jnp.clip(tile_m, 0, len(tile_i) - 1), :, :, at_m % rows]
  low_mf, high_mf = layout.low_high(jnp.float32(levels_enf).swapaxes(0, 1)[:, expert_m])
  y_mf = sums_mnf[:, 0] * ((high_mf - low_mf) / (2 * layout.UNIT))
  if levels_enf.shape[1] == 2:
    y_mf = y_mf + sums_mnf[:, 1] * ((high_mf + low_mf) / (2 * layout.UNIT))
  inside_m1 = (row_m < group_sizes_e.sum())[:, None]
  return jnp.where(inside_m1, y_mf, 0).astype(x_md.dtype)


def _arranged(x_itd: jax.Array, words: int) -> jax.Array:
  """x with the inputs of the same bits of INPUTS words beside each other, padded to whole steps."""
  i, rows, d = x_itd.shape
  steps = -(-words // INPUTS)
  x = jnp.pad(x_itd, ((0, 0), (0, 0), (0, steps * STEP - d)))
  x = x.reshape(i, rows, steps, STEP // layout.CHUNK, layout.STEPS, layout.WORDS, 2)
  return x.transpose(0, 1, 2, 4, 6, 3, 5).reshape(i, rows, steps * STEP)


def _products(x_itd, words_ewf, experts_i, levels, interpret):
  """x times signs, and times sizes where there are two levels; float32 [tiles, levels, f, rows]."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu  # Half a second to import.

  tiles, rows, _ = x_itd.shape
  f = words_ewf.shape[2]
  steps = x_itd.shape[2] // STEP
  masks = (SIGN_AND_EXPONENT, EXPONENT)[:levels]
  swizzled = lambda bits: (plgpu.TilingTransform((8, 1024 // bits)), plgpu.SwizzleTransform(128))

  def step(sums, w_smem, _, words_smem, x_smem):
    words = words_smem[...]
    for product in range(2 * layout.STEPS * levels):
      part, mask = product // levels, masks[product % levels]
      shift = np.uint32(2 * (part // 2) + 16 * (1 - part % 2))
      weights = jax.lax.bitcast_convert_type((words << shift) & mask, jnp.float32)
      slot = w_smem.at[product % 2]
      slot[...] = weights.astype(jnp.bfloat16)
      plgpu.commit_smem()
      x_part = x_smem.at[:, pl.ds(part * INPUTS, INPUTS)]
      plgpu.wgmma(sums[product % levels], slot.transpose((1, 0)), x_part.transpose((1, 0)))
      plgpu.wgmma_wait(1)  # The other slot is free again.
    plgpu.wgmma_wait(0)

  def kernel(x_gmem, words_gmem, experts_gmem, y_gmem, y_smem, w_smem):
    column, tile = jax.lax.axis_index('column'), jax.lax.axis_index('tile')
    expert = experts_gmem[tile]

    def summed(*sums):
      plgpu.emit_pipeline(
          functools.partial(step, sums, w_smem),
          grid=(steps,),
          in_specs=[
              plgpu.BlockSpec((INPUTS, COLUMNS), lambda k: (k, column), transforms=swizzled(32)),
              plgpu.BlockSpec((rows, STEP), lambda k: (0, k), transforms=swizzled(16)),
          ],
          max_concurrent_steps=min(STAGES, steps),
      )(words_gmem.at[expert], x_gmem.at[tile])
      return tuple(total[...] for total in sums)

    @pl.when(expert >= 0)
    def _():
      sums = pl.run_scoped(summed, *[plgpu.ACC((COLUMNS, rows), jnp.float32)] * levels)
      for level, total in enumerate(sums):
        y_smem[level] = total
      plgpu.commit_smem()
      for level in range(levels):
        columns = pl.ds(column * COLUMNS, COLUMNS)
        plgpu.copy_smem_to_gmem(y_smem.at[level], y_gmem.at[tile, level, columns, :])
      plgpu.wait_smem_to_gmem(0)

  scratch = {
      'y_smem': plgpu.SMEM((levels, COLUMNS, rows), jnp.float32),
      'w_smem': plgpu.SMEM((2, INPUTS, COLUMNS), jnp.bfloat16, transforms=swizzled(16)),
  }
  out = jax.ShapeDtypeStruct((tiles, levels, f, rows), jnp.float32)
  return plgpu.kernel(
      kernel, out_type=out, grid=(f // COLUMNS, tiles), grid_names=('column', 'tile'),
      scratch_types=scratch, interpret=interpret,
  )(x_itd, words_ewf, experts_i)
