"""The product in XLA for CPUs: weights are made of their bits where they are multiplied.

The bits of a weight in the upper half of a word are a float32 as well, 0, 2.0 or -2.0. One row goes
through an expert word by word, its sums stay in the cache; several rows take a chunk of 256 inputs
at a time, which is expanded and multiplied. No expert is ever expanded whole.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.grouped_matmul import ref as grouped
from kernels_pallas.ternary_matmul import layout

_MASKS = (np.uint32(0xC0000000), np.uint32(0x40000000))
# How far a weight's bits are from the top of its word, by step and half.
_SHIFTS = (2 * np.arange(layout.STEPS)[:, None] + 16 * np.array([1, 0])).astype(np.uint32)


def _one_row(x_1d: jax.Array, words_wf: jax.Array, levels_nf: jax.Array) -> jax.Array:
  """[1, f] float32: signs and, with two levels, magnitudes are added up word by word."""
  w, f = words_wf.shape
  x_d = jnp.pad(x_1d[0].astype(jnp.float32), (0, w * layout.STEPS * 2 - x_1d.shape[1]))
  x_wj = x_d.reshape(-1, layout.STEPS, layout.WORDS, 2).swapaxes(1, 2).reshape(w, -1)

  def add(i, sums):
    word_f, x_j = words_wf[i], x_wj[i]
    for j, shift in enumerate(_SHIFTS.reshape(-1)):
      weights = ((word_f << shift) & mask for mask in _MASKS)
      sums = [s + x_j[j] * jax.lax.bitcast_convert_type(t, jnp.float32)
              for s, t in zip(sums, weights)]
    return sums

  sums = jax.lax.fori_loop(0, w, add, [jnp.zeros(f, jnp.float32)] * levels_nf.shape[0])
  low, high = layout.low_high(levels_nf.astype(jnp.float32))
  y_f = sums[0] * ((high - low) / (2 * layout.UNIT))
  if len(sums) == 2:
    y_f += sums[1] * ((high + low) / (2 * layout.UNIT))
  return y_f[None]


def _rows(x_md: jax.Array, words_wf: jax.Array, levels_nf: jax.Array) -> jax.Array:
  """[m, f] float32, a chunk at a time."""
  (m, d), (w, f) = x_md.shape, words_wf.shape
  x_md = jnp.pad(x_md.astype(jnp.float32), ((0, 0), (0, w * layout.STEPS * 2 - d)))
  x_cmk = x_md.reshape(m, -1, layout.CHUNK).swapaxes(0, 1)
  low, high = layout.low_high(levels_nf.astype(jnp.float32)[:, None])

  def add(i, y_mf):
    words = jax.lax.dynamic_slice_in_dim(words_wf, i * layout.WORDS, layout.WORDS)
    bits = (words[None, :, None] << _SHIFTS[:, None, :, None]) & _MASKS[0]
    signs = jax.lax.bitcast_convert_type(bits, jnp.float32).reshape(layout.CHUNK, f)
    weights = jnp.where(signs > 0, high, jnp.where(signs < 0, low, 0.0))
    return y_mf + jnp.dot(x_cmk[i], weights, preferred_element_type=jnp.float32)

  return jax.lax.fori_loop(0, w // layout.WORDS, add, jnp.zeros((m, f), jnp.float32))


def product(x_md: jax.Array, words_wf: jax.Array, levels_nf: jax.Array) -> jax.Array:
  """x by one expert, float32 [m, f]."""
  return (_one_row if len(x_md) == 1 else _rows)(x_md, words_wf, levels_nf)


def ternary_matmul(
    x_md: jax.Array, words_ewf: jax.Array, levels_enf: jax.Array, group_sizes_e: jax.Array
) -> jax.Array:
  """See `api.ternary_matmul`."""
  pick = lambda a, e: jax.lax.dynamic_index_in_dim(a, e, 0, keepdims=False)

  return grouped.in_blocks(
      x_md, lambda e, x_block: product(x_block, pick(words_ewf, e), pick(levels_enf, e)),
      group_sizes_e, words_ewf.shape[2],
  )
