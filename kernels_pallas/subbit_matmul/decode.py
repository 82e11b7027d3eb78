"""Codes of blocks into two-bit words, in XLA: a step of eight words at a time, of every column."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.subbit_matmul import block, layout


def _before(a: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Sums of the rows above each, and of all, in every row."""
  sums = a
  for n in (1, 2, 4):
    sums = sums + jnp.pad(sums[:-n], ((n, 0), (0, 0)))
  return sums - a, jnp.broadcast_to(sums[-1:], a.shape)


def two_bit_words(
    rows_rl: jax.Array, ends_t: jax.Array, homes_tl: jax.Array, patches_tp: jax.Array, d: int, f: int, size: int,
) -> jax.Array:
  """One strip's words, uint32 [depth / 16, f].

  Args:
    rows_rl: uint32 [r, 128], the rows of its tiles and more.
    ends_t: int32 [tiles + 1], the first row of each tile, and past the last one's.
    homes_tl: [tiles, 128], see `layout.homes`.
    patches_tp: uint32 [tiles, p], zeros where there is none.
    d, f, size: inputs of the matrix, outputs, and weights of a block.
  """
  form = layout.Form(size)
  tiles = ends_t.shape[0] - 1
  columns = tiles * layout.LANES
  steps, head = layout.steps_of(d, size), layout.class_rows(d, size)
  flat = jax.lax.bitcast_convert_type(rows_rl, jnp.int32).reshape(-1)
  spread = lambda a: jnp.repeat(a, layout.LANES)[None]
  lane = jnp.tile(jnp.arange(layout.LANES), tiles)[None]
  first, last = spread(ends_t[:-1]), spread(ends_t[1:] - 1)
  word = lambda row: flat.at[row * layout.LANES + lane].get(mode='clip')
  sublane = jnp.arange(layout.SUBLANES)[:, None]

  def bits_at(stream_word, at):
    shift = at & 31
    low, high = word(stream_word(block.shr(at, 5))), word(stream_word(block.shr(at, 5) + 1))
    return block.shr(low, shift) | block.shl(block.shl(high, 1), 31 - shift)

  def group(starts, q):
    classes = word(first + q * layout.SUBLANES + sublane)
    made = []
    for j in range(form.together):
      words, starts = block.decode_step(
          classes, j, starts, form, before=_before, pair_of=lambda x: block.pair(x, form),
          fields_at=lambda at: bits_at(lambda w: first + head + w, at),
          entries_at=lambda at: bits_at(lambda w: last - w, at),
      )
      made += words
    return starts, jnp.concatenate(made)

  zeros = jnp.zeros((layout.SUBLANES, columns), jnp.int32)
  _, made = jax.lax.scan(group, (zeros, zeros), jnp.arange(-(-steps // form.together)))
  words = jax.lax.bitcast_convert_type(made.reshape(-1, columns), jnp.uint32)
  words = _patched(words[: layout.depth_of(d) // 16], patches_tp)
  return words[:, layout.place_of(homes_tl, jnp)[:f]]


def _patched(words_wc: jax.Array, patches_tp: jax.Array) -> jax.Array:
  """Half words added where there are zeros."""
  if not patches_tp.shape[1]:
    return words_wc
  half = (patches_tp >> 31) * 16
  column = jnp.arange(patches_tp.shape[0])[:, None] * layout.LANES + (patches_tp >> 16 & 127)
  row = (patches_tp >> 23 & 255).astype(jnp.int32)
  return words_wc.at[row, column.astype(jnp.int32)].add((patches_tp & 0xFFFF) << half)
