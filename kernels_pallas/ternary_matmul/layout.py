"""Two bits a weight, in the order in which masks turn words into bfloat16 weights.

A column of W (an output) is cut into chunks of 256 inputs, a chunk into 16 words. Word r of a chunk
holds at bits 15 - 2i and 14 - 2i the input 32 i + 2 r, 16 bits higher the one after it, i = 0 .. 7:
`(word << 2 i) & 0xC000C000` is two bfloat16, and one chunk's words are 32 rows of W for each i.
Bits: 00 zero, 01 high (+2.0), 11 low (-2.0). Inputs past d are zeros.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 256  # Inputs.
WORDS = 16  # Words of a chunk.
STEPS = 8  # Shifts of a word; each gives two weights.
BOTH = np.uint32(0xC000C000)
EXPONENTS = np.uint32(0x40004000)
UNIT = 2.0  # What a high weight is as a bfloat16.
# Where a weight's bits are, over [expert, chunk, step, word, half, column].
_SHIFTS = (14 - 2 * np.arange(STEPS)[:, None, None] + 16 * np.arange(2)).astype(np.uint32)
_SHIFTS = _SHIFTS[None, None, :, :, :, None]


def words_of(d: int) -> int:
  """Words a column of d inputs takes."""
  return -(-d // CHUNK) * WORDS


def pack(signs_edf: Any, xp: Any = np) -> Any:
  """{-1, 0, 1} integers [e, d, f] as uint32 [e, words_of(d), f]; -1 is low, 1 high.

  `xp` is numpy (a host array) or jax.numpy (traceable).
  """
  e, d, f = signs_edf.shape
  signs = xp.pad(signs_edf.astype(xp.int32), ((0, 0), (0, -d % CHUNK), (0, 0)))
  bits = xp.where(signs == 0, 0, xp.where(signs > 0, 1, 3)).astype(xp.uint32)
  bits = bits.reshape(e, -1, STEPS, WORDS, 2, f)
  placed = bits << _SHIFTS
  return placed.sum((2, 4), dtype=xp.uint32).reshape(e, words_of(d), f)


def unpack(words_ewf: Any, d: int, xp: Any = np) -> Any:
  """The integers again, int8 [e, d, f]."""
  e, w, f = words_ewf.shape
  words = words_ewf.reshape(e, w // WORDS, 1, WORDS, 1, f)
  bits = (words >> _SHIFTS) & np.uint32(3)
  signs = xp.where(bits == 3, -1, bits.astype(xp.int32)).astype(xp.int8)
  return signs.reshape(e, -1, f)[:, :d]


def low_high(levels_nf: Any) -> tuple[Any, Any]:
  """The values [f] of low and of high weights."""
  return (levels_nf[0] if levels_nf.shape[0] == 2 else -levels_nf[0]), levels_nf[-1]


def halves(words_wf: jax.Array) -> jax.Array:
  """One expert's words as bfloat16 [256 chunks, f] of 0, 2.0 and -2.0, by masks alone."""
  w, f = words_wf.shape
  shift = (2 * np.arange(STEPS, dtype=np.uint32))[None, :, None, None]
  pairs = (words_wf.reshape(-1, 1, WORDS, f) << shift) & BOTH
  weights = jax.lax.bitcast_convert_type(pairs, jnp.bfloat16)  # [..., f, 2], the low half first.
  return weights.swapaxes(-1, -2).reshape(-1, f)


def dense(words_wf: jax.Array, levels_nf: jax.Array, d: int, dtype: Any) -> jax.Array:
  """One expert's matrix [d, f]."""
  signs = halves(words_wf)[:d]
  low, high = low_high(levels_nf.astype(dtype))
  zero = jnp.zeros((), dtype)
  return jnp.where(signs > 0, high, jnp.where(signs < 0, low, zero))
