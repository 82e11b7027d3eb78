"""The product from codewords in plain XLA: work and memory follow the nonzeros."""

import jax
import jax.numpy as jnp
import numpy as np

_CHUNK = 64
_TOGETHER = 8


def _sums_before(x_w: jax.Array) -> jax.Array:
  """Sum of all entries before each; chunks by matmul with a triangle, exact below 2^24."""
  n = x_w.shape[0]
  chunks = jnp.pad(x_w, (0, -n % _CHUNK**2)).reshape(-1, _CHUNK, _CHUNK).astype(jnp.float32)
  before = jnp.asarray(np.triu(np.ones((_CHUNK, _CHUNK), np.float32), 1))
  exact = jax.lax.Precision.HIGHEST
  inside = jnp.einsum('abc,cd->abd', chunks, before, precision=exact)
  inside += jnp.einsum('ab,bd->ad', chunks.sum(2), before, precision=exact)[:, :, None]
  total = chunks.sum((1, 2)).astype(jnp.int32)
  earlier = np.tril(np.ones((total.shape[0],) * 2, bool), -1)
  start = jnp.where(earlier, total[None, :], 0).sum(axis=1)
  return (inside.astype(jnp.int32) + start[:, None, None]).reshape(-1)[:n]


def _codeword_starts(length_w: jax.Array, offsets_b: jax.Array, size: int, block: int) -> jax.Array:
  """First weight of each codeword; a block's last codeword may reach past the block's end."""
  last = offsets_b[1:] - 1
  ends = (_sums_before(length_w) + length_w)[last]
  blocks = offsets_b.shape[0] - 1
  sizes = np.full(blocks, block)
  sizes[-1] = size - (blocks - 1) * block
  over = ends - jnp.append(0, ends[:-1]) - jnp.asarray(sizes, jnp.int32)
  return _sums_before(length_w.at[last].add(-over))


def _nonzeros(
    x_c: jax.Array, packed: list[jax.Array], start: jax.Array, field_bits: int, none: int
) -> list[tuple[jax.Array, jax.Array]]:
  """(2 * row + is high, x at the column) of each field; the target is `none` if it is empty.

  Rows count from where the weight numbers `start` do.
  """
  empty, found = (1 << field_bits) - 1, []
  for word in packed:
    for shift in range(0, 32, field_bits):
      field = ((word >> shift) & empty).astype(jnp.int32)
      place = start + (field >> 1)
      row = jax.lax.div(place, jnp.int32(x_c.shape[0]))
      value = x_c.at[place - row * x_c.shape[0]].get(mode='clip')
      found.append((jnp.where(field != empty, 2 * row + (field & 1), none), value))
  return found


def _sums_of_neighbours(
    x_c: jax.Array, packed: list[jax.Array], start_w: jax.Array, field_bits: int, together: int
) -> tuple[jax.Array, jax.Array]:
  """What `together` codewords in a row, at most `cols` weights, add to the two rows they touch.

  Targets 2 * row + is high, and values. The barriers keep XLA from computing a value four times.
  """

  def fold(a, fill):
    padded = jnp.pad(a, (0, -a.shape[0] % together), constant_values=fill)
    return padded.reshape(-1, together).T

  start = fold(start_w, 0)
  row = jax.lax.div(start[0], jnp.int32(x_c.shape[0]))
  packed = [fold(word, np.uint32(2**32 - 1)) for word in packed]
  found = jax.lax.optimization_barrier(
      _nonzeros(x_c, packed, start - (row * x_c.shape[0])[None], field_bits, none=4)
  )
  sums = jax.lax.optimization_barrier([
      sum(jnp.where(to[i] == j, value[i], 0.0) for to, value in found for i in range(together))
      for j in range(4)
  ])
  return jnp.concatenate([2 * row + j for j in range(4)]), jnp.concatenate(sums)


def codeword_matvec(
    x_c: jax.Array, words_w: jax.Array, offsets_b: jax.Array, levels_r2: jax.Array,
    length_u: jax.Array, fields_ju: jax.Array, *, field_bits: int, max_length: int,
    block_rows: int,
) -> jax.Array:
  """W x, float32 [rows]; see the package for the arguments.

  For each nonzero, x at its column is added to its row's sum of lows or of highs; the two sums
  then meet the row's levels, so a level is multiplied once a row. Neighbouring codewords are added
  up first: on CPU a scattered add takes as long as several of these steps.
  """
  rows, cols = levels_r2.shape[0], x_c.shape[0]
  words, x_c = words_w.astype(jnp.int32), x_c.astype(jnp.float32)
  index = jnp.arange(words.shape[0])
  own = (index >= offsets_b[0]) & (index < offsets_b[-1])
  length = jnp.where(own, length_u[words], 0)
  start = _codeword_starts(length, offsets_b, rows * cols, block_rows * cols)
  packed = [jnp.where(own, fields_u[words], np.uint32(2**32 - 1)) for fields_u in fields_ju]
  together = min(_TOGETHER, cols // max_length)
  if together > 1:
    targets, values = _sums_of_neighbours(x_c, packed, start, field_bits, together)
  else:
    found = _nonzeros(x_c, packed, start, field_bits, none=2 * rows)
    targets, values = (jnp.concatenate(a) for a in zip(*found))
  sums = jnp.zeros(2 * rows, jnp.float32).at[targets].add(values, mode='drop')
  return (sums.reshape(rows, 2) * levels_r2.astype(jnp.float32)).sum(axis=1)
