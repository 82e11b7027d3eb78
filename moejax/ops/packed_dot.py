"""expert_dot for 2-, 3- and 4-bit weights on CPU: unpacked where they are multiplied.

Several rows take a piece of the inputs at a time, which is unpacked and multiplied; one row goes
through an expert word by word, its sums stay in the cache. No expert is expanded whole, but for
odd widths.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.grouped_matmul import ref as grouped
from moejax import weights
from moejax.codec import packing

_WHOLE = 32  # Inputs that end on a word border in every field.


def _one_row(x_1d: jax.Array, node: weights.Packed, expert: jax.Array) -> jax.Array:
  """[1, f] float32: scale (x symbols - zero sum(x)), of a node with one scale for an output."""
  x_d = x_1d[0].astype(jnp.float32)
  pick = lambda a: jax.lax.dynamic_index_in_dim(jnp.asarray(a), expert, 0, keepdims=False)
  words_wf = pick(node.words)
  total, begin, done = jnp.zeros(words_wf.shape[1], jnp.float32), 0, 0
  for field in packing.FIELDS[node.width]:
    per_word, mask = 32 // field, np.uint32((1 << field) - 1)
    count = -(-node.cols // per_word)
    x_wj = jnp.pad(x_d * 2.0**done, (0, count * per_word - node.cols)).reshape(count, per_word)

    def add(i, total_f, begin=begin, field=field, per_word=per_word, mask=mask, x_wj=x_wj):
      word_f, x_j = words_wf[begin + i], x_wj[i]
      for j in range(per_word):
        symbols = ((word_f >> np.uint32(field * j)) & mask).astype(jnp.int32)
        total_f += x_j[j] * symbols.astype(jnp.float32)
      return total_f

    total = jax.lax.fori_loop(0, count, add, total)
    begin, done = begin + count, done + field
  scale, zero = (pick(a).astype(jnp.float32)[:, 0] for a in (node.scale, node.zero))
  return (scale * (total - zero * x_d.sum()))[None]


def packed_dot(x_md: jax.Array, node: weights.Packed, group_sizes_e: jax.Array) -> jax.Array:
  """y[rows of e] = x[rows of e] w_e, [m, f] in x's dtype, accumulated in float32."""
  _, d, f = node.shape
  piece = grouped.piece_of(d)
  if piece % _WHOLE:
    piece = d

  def product(e, x_block):
    if len(x_block) == 1 and not node.group_size:
      return _one_row(x_block, node, e)

    def add(i, y):
      first = i * piece if piece < d else 0
      w = node.inputs_at(e, first, piece, x_block.dtype)
      x = jax.lax.dynamic_slice_in_dim(x_block, first, piece, 1)
      return y + jnp.dot(x, w, preferred_element_type=jnp.float32)

    return jax.lax.fori_loop(0, d // piece, add, jnp.zeros((len(x_block), f), jnp.float32))

  return grouped.in_blocks(x_md, product, group_sizes_e, f)
