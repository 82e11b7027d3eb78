"""The product on GPUs: expanded experts by XLA, and a Mosaic GPU kernel, see `hopper`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import hopper
from kernels_pallas.grouped_matmul import ref as grouped
from kernels_pallas.ternary_matmul import layout

PARTS = 2 * layout.STEPS  # Weights of a word.
BLOCK = PARTS * hopper.WORDS  # Inputs of a block.
MASKS = (np.uint32(0xC0000000), np.uint32(0x40000000))  # Sign and exponent; the exponent alone.


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


def mosaic_ternary_matmul(
    x_md: jax.Array, words_ewf: jax.Array, levels_enf: jax.Array, group_sizes_e: jax.Array, *,
    interpret: Any = None,
) -> jax.Array:
  """See `api.ternary_matmul`: products with the signs s, and with |s| for two levels.

  W = s (high - low) / 2 + |s| (high + low) / 2.

  Args:
    interpret: see `hopper.products`.

  Raises:
    ValueError: what `hopper.supports` does not take.
  """
  m, (e, w, f) = len(x_md), words_ewf.shape
  if reason := hopper.supports(m, f, e, x_md.dtype):
    raise ValueError(f'mosaic_ternary_matmul: {reason}')
  levels = levels_enf.shape[1]

  def decode(words, part):
    placed = words << np.uint32(2 * (part // 2) + 16 * (1 - part % 2))
    floats = (jax.lax.bitcast_convert_type(placed & mask, jnp.float32) for mask in MASKS[:levels])
    return [a.astype(jnp.bfloat16) for a in floats]

  tiles = hopper.tiles(m, group_sizes_e, PARTS)
  sums_mnf = tiles.rows(hopper.products(
      _by_part(tiles.of(x_md), w), words_ewf, tiles.expert_i, decode, parts=PARTS, sums=levels,
      interpret=interpret,
  ))
  low_mf, high_mf = layout.low_high(jnp.float32(levels_enf).swapaxes(0, 1)[:, tiles.expert_m])
  y_mf = sums_mnf[:, 0] * ((high_mf - low_mf) / (2 * layout.UNIT))
  if levels == 2:
    y_mf = y_mf + sums_mnf[:, 1] * ((high_mf + low_mf) / (2 * layout.UNIT))
  return jnp.where(tiles.inside_m[:, None], y_mf, 0).astype(x_md.dtype)


def _by_part(x_ird: jax.Array, words: int) -> jax.Array:
  """x as `hopper.products` wants it: chunks of words, each its steps and halves."""
  i, rows, d = x_ird.shape
  blocks = -(-words // hopper.WORDS)
  x = jnp.pad(x_ird, ((0, 0), (0, 0), (0, blocks * BLOCK - d)))
  x = x.reshape(i, rows, blocks, BLOCK // layout.CHUNK, layout.STEPS, layout.WORDS, 2)
  return x.transpose(0, 1, 2, 4, 6, 3, 5).reshape(i, rows, blocks * BLOCK)
