"""The product from codewords in plain XLA: work and memory follow the nonzeros."""

import jax
import jax.numpy as jnp
import numpy as np

_CHUNK = 64


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


def subbit_matvec(
    x_c: jax.Array, words_w: jax.Array, offsets_b: jax.Array, levels_r2: jax.Array,
    length_u: jax.Array, fields_ju: jax.Array, *, field_bits: int, block_rows: int,
) -> jax.Array:
  """W x, float32 [rows]; see the package for the arguments.

  For each nonzero, x at its column is added to its row's sum of lows or of highs; the two sums
  then meet the row's levels, so a level is multiplied once a row.
  """
  rows, cols = levels_r2.shape[0], x_c.shape[0]
  words = words_w.astype(jnp.int32)
  index = jnp.arange(words.shape[0])
  own = (index >= offsets_b[0]) & (index < offsets_b[-1])
  length = jnp.where(own, length_u[words], 0)
  start = _codeword_starts(length, offsets_b, rows * cols, block_rows * cols)
  none = (1 << field_bits) - 1
  targets, values = [], []
  for j in range(fields_ju.shape[0]):
    packed = fields_ju[j][words]
    for shift in range(0, 32, field_bits):
      field = ((packed >> shift) & none).astype(jnp.int32)
      place = start + (field >> 1)
      row = place // cols
      targets.append(jnp.where(own & (field != none), 2 * row + (field & 1), 2 * rows))
      values.append(x_c.astype(jnp.float32).at[place - row * cols].get(mode='clip'))
  sums = jnp.zeros(2 * rows, jnp.float32).at[jnp.concatenate(targets)].add(
      jnp.concatenate(values), mode='drop'
  )
  return (sums.reshape(rows, 2) * levels_r2.astype(jnp.float32)).sum(axis=1)
