"""The product in plain XLA, for CPUs: weights are unpacked where they are multiplied.

Several rows take a piece of the inputs at a time, which is unpacked and multiplied; one row goes
through an expert word by word, its sums stay in the cache. No expert is expanded whole, but for
odd widths.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.grouped_matmul import ref as grouped
from kernels_pallas.packed_matmul import layout

_WHOLE = 32  # Inputs that end on a word border in every field.


def _one_row(
    x_1d: jax.Array, words_wf: jax.Array, scale_f: jax.Array, zero_f: jax.Array, bits: int
) -> jax.Array:
  """[1, f] float32: scale (x symbols - zero sum(x)), of one scale for an output."""
  x_d = x_1d[0].astype(jnp.float32)
  d = len(x_d)
  total, begin, done = jnp.zeros(words_wf.shape[1], jnp.float32), 0, 0
  for field in layout.FIELDS[bits]:
    per_word, mask = 32 // field, np.uint32((1 << field) - 1)
    count = -(-d // per_word)
    x_wj = jnp.pad(x_d * 2.0**done, (0, count * per_word - d)).reshape(count, per_word)

    def add(i, total_f, begin=begin, field=field, per_word=per_word, mask=mask, x_wj=x_wj):
      word_f, x_j = words_wf[begin + i], x_wj[i]
      for j in range(per_word):
        symbols = ((word_f >> np.uint32(field * j)) & mask).astype(jnp.int32)
        total_f += x_j[j] * symbols.astype(jnp.float32)
      return total_f

    total = jax.lax.fori_loop(0, count, add, total)
    begin, done = begin + count, done + field
  return (scale_f * (total - zero_f * x_d.sum()))[None]


def packed_matmul(
    x_md: jax.Array, words_ewf: jax.Array, scale_efg: jax.Array, zero_efg: jax.Array,
    group_sizes_e: jax.Array, *, bits: int, group_size: int = 0,
) -> jax.Array:
  """See `api.packed_matmul`."""
  d, f = x_md.shape[1], words_ewf.shape[2]
  piece = grouped.piece_of(d)
  if piece % _WHOLE:
    piece = d

  def product(e, x_block):
    pick = lambda a: jax.lax.dynamic_index_in_dim(a, e, 0, keepdims=False)
    if len(x_block) == 1 and not group_size:
      scale, zero = (pick(a).astype(jnp.float32)[:, 0] for a in (scale_efg, zero_efg))
      return _one_row(x_block, pick(words_ewf), scale, zero, bits)

    def add(i, y):
      first = i * piece if piece < d else 0
      w = layout.inputs_at(
          pick(words_ewf), pick(scale_efg), pick(zero_efg), d, bits, group_size, first, piece,
          x_block.dtype,
      )
      x = jax.lax.dynamic_slice_in_dim(x_block, first, piece, 1)
      return y + jnp.dot(x, w, preferred_element_type=jnp.float32)

    return jax.lax.fori_loop(0, d // piece, add, jnp.zeros((len(x_block), f), jnp.float32))

  return grouped.in_blocks(x_md, product, group_sizes_e, f)
