"""Codes of blocks into two-bit words, in XLA: a step of eight words at a time, of every column."""

import jax
import jax.numpy as jnp

from kernels_pallas.subbit_matmul import layout
from kernels_pallas.subbit_matmul.layout import block


def _before(a: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Sums of the rows above each, and of all, in every row."""
  sums = a
  for n in (1, 2, 4):
    sums = sums + jnp.pad(sums[:-n], ((n, 0), (0, 0)))
  return sums - a, jnp.broadcast_to(sums[-1:], a.shape)


def kept_words(
    rows_rl: jax.Array, starts_es: jax.Array, records_es1w: jax.Array, expert: jax.Array | int,
    sizes: layout.Sizes,
) -> jax.Array:
  """One expert's two-bit words, uint32 [strips * depth / 16, 128 tiles], in the order kept.

  See the package for the arrays; `expert` may be traced.
  """
  pick = lambda a: jax.lax.dynamic_index_in_dim(jnp.asarray(a), expert, 0, keepdims=False)
  starts_s, records_sw = pick(starts_es), pick(records_es1w)[:, 0]
  strips = [
      _strip(jnp.asarray(rows_rl), starts_s[i], records_sw[i], sizes) for i in range(sizes.strips)
  ]
  return strips[0] if len(strips) == 1 else jnp.concatenate(strips)


def _strip(
    rows_rl: jax.Array, start: jax.Array, record_w: jax.Array, sizes: layout.Sizes
) -> jax.Array:
  """The words of one strip, [depth / 16, 128 tiles]."""
  form, tiles = sizes.form, sizes.tiles
  columns, tail = tiles * layout.LANES, sizes.tail
  head = layout.SUBLANES * tail.group
  headers = record_w[: tiles * sizes.header].reshape(tiles, -1)
  ends = jnp.append(headers[:, 0], record_w[tiles * sizes.header])
  # Within a window of the rows, so that places are small. Where it would reach past their end it
  # starts earlier.
  window = min(sizes.deep, rows_rl.shape[0])
  begin = jnp.minimum(start, rows_rl.shape[0] - window)
  window_rl = jax.lax.dynamic_slice_in_dim(rows_rl, begin, window)
  window_rl = jax.lax.bitcast_convert_type(window_rl, jnp.int32)
  flat, ends = window_rl.reshape(-1), ends + (start - begin)
  spread = lambda a: jnp.repeat(a, layout.LANES)[None]
  lane = jnp.tile(jnp.arange(layout.LANES), tiles)[None]
  first, last = spread(ends[:-1]), spread(ends[1:] - 1)
  word = lambda row: flat.at[row * layout.LANES + lane].get(mode='clip')
  # XLA would compute what several uses share for each of them.
  once = jax.lax.optimization_barrier

  def fields_at(at):
    at = once(at)
    shift, row = at & 31, first + head + block.shr(at, 5)
    low, high = word(row), word(row + 1)
    return once(block.shr(low, shift) | block.shl(block.shl(high, 1), 31 - shift))

  def entries_at(at):
    at = once(at)
    shift, row = at & 31, last - block.shr(at, 5)
    high, low = word(row), word(row - 1)
    return once(block.shl(high, shift) | block.shr(block.shr(low, 1), 31 - shift))

  sublane = jnp.broadcast_to(jnp.arange(layout.SUBLANES)[:, None], (layout.SUBLANES, columns))
  if tail.steps:
    tail_bits = fields_at(tail.at(sublane, jnp))
    tail_classes = once(block.tail_classes(tail_bits, sublane, form, tail))

  def classes_of(group):
    if not tail.group:
      return tail_classes
    row = group * layout.SUBLANES
    whole = jax.vmap(
        lambda start: jax.lax.dynamic_slice_in_dim(window_rl, start + row, layout.SUBLANES)
    )(ends[:-1]).swapaxes(0, 1).reshape(layout.SUBLANES, columns)
    return jnp.where(group == tail.group, tail_classes, whole) if tail.steps else whole

  def step(t, carry):
    made, starts = carry
    classes = classes_of(t // form.together)
    words, starts = block.decode_step(
        once(classes), jnp.broadcast_to(t % form.together, classes.shape), starts, form,
        before=lambda a: once(_before(once(a))), pair_of=lambda x: once(block.pair(x, form)),
        fields_at=fields_at, entries_at=entries_at,
    )
    for i, word_rows in enumerate(once(words)):
      at = (t * form.words + i) * layout.SUBLANES
      made = jax.lax.dynamic_update_slice(made, word_rows, (at, 0))
    return made, starts

  zeros = jnp.zeros((layout.SUBLANES, columns), jnp.int32)
  made = jnp.zeros((layout.depth_of(sizes.d) // 16, columns), jnp.int32)
  steps = layout.steps_of(sizes.d, sizes.size)
  made, _ = jax.lax.fori_loop(0, steps, step, (made, (zeros + tail.end, zeros)))
  words = jax.lax.bitcast_convert_type(made, jnp.uint32)
  if not sizes.patches:
    return words
  tile = jnp.searchsorted(headers[:, -1], jnp.arange(sizes.patches), side='right')
  place, bits = record_w[tiles * sizes.header + 1 :].reshape(-1, 2).T
  return _patched(words, tile, place, jax.lax.bitcast_convert_type(bits, jnp.uint32))


def _patched(
    words_wc: jax.Array, tile_p: jax.Array, place_p: jax.Array, bits_p: jax.Array
) -> jax.Array:
  """Words with patches where there are zeros; those that no tile has are past all columns."""
  column = tile_p * layout.LANES + (place_p & (layout.LANES - 1))
  return words_wc.at[place_p >> 7, column].add(bits_p, mode='drop')
