"""2-, 3- and 4-bit symbols packed into 32-bit words, row by row.

A width is split into fields that divide 32: 2 bits are one field of 2, 4 one of 4, 3 a field of 2
(low bits) and one of 1. The words of one field follow those of the field before; within a word the
first symbol has the lowest bits; each field ends a row on a word border.

Works on NumPy and JAX arrays alike; `unpack` is jit-able.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

FIELDS: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,)}


def words_per_row(cols: int, bits: int) -> int:
  """uint32 words that hold one row of `cols` symbols."""
  return sum(-(-cols * field // 32) for field in FIELDS[bits])


def pack(symbols: np.ndarray, bits: int) -> np.ndarray:
  """uint32 [..., words] of integer symbols [..., cols] in 0 .. 2^bits - 1."""
  symbols = np.asarray(symbols)
  cols = symbols.shape[-1]
  if symbols.size and (symbols.min() < 0 or symbols.max() >= 1 << bits):
    raise ValueError(f'symbols {symbols.min()}..{symbols.max()} do not fit {bits} bits')
  parts, done = [], 0
  for field in FIELDS[bits]:
    per_word = 32 // field
    values = (symbols.astype(np.uint32) >> done) & ((1 << field) - 1)
    values = np.pad(values, [(0, 0)] * (symbols.ndim - 1) + [(0, -cols % per_word)])
    values = values.reshape(*symbols.shape[:-1], -1, per_word)
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(field)
    parts.append(np.bitwise_or.reduce(values << shifts, axis=-1))
    done += field
  return np.concatenate(parts, axis=-1)


def unpack(words: Any, cols: int, bits: int) -> Any:
  """int32 symbols [..., cols] of `pack`ed words; NumPy in, NumPy out."""
  xp: Any = np if isinstance(words, np.ndarray) else jnp
  total, first, done = None, 0, 0
  for field in FIELDS[bits]:
    count = -(-cols * field // 32)
    part = words[..., first : first + count]
    shifts = np.arange(32 // field, dtype=np.uint32) * np.uint32(field)
    shifts = shifts.reshape((1,) * part.ndim + (-1,))
    values = (part[..., None] >> xp.asarray(shifts)) & np.uint32((1 << field) - 1)
    values = values.reshape(*part.shape[:-1], -1)[..., :cols].astype(np.int32) << done
    total = values if total is None else total | values
    first, done = first + count, done + field
  return total
