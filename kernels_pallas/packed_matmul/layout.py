"""2-, 3-, 4- and 8-bit symbols of a matrix packed into 32-bit words along its inputs.

A width is split into fields that divide 32: 2 bits are one field of 2, 4 one of 4, 3 a field of 2
(low bits) and one of 1, 8 two of 4. The words of one field follow those of the field before; within
a word the first input has the lowest bits; each field ends a column on a word border. Words of
neighbouring outputs lie side by side, so that one shift unpacks a row of many outputs.

Works on NumPy and JAX arrays alike; `unpack` is jit-able.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FIELDS: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 8: (4, 4)}


def words_per_column(inputs: int, bits: int) -> int:
  """uint32 words that hold one column of `inputs` symbols."""
  return sum(-(-inputs * field // 32) for field in FIELDS[bits])


def pack(symbols: np.ndarray, bits: int) -> np.ndarray:
  """uint32 [..., words, f] of integer symbols [..., inputs, f] in 0 .. 2^bits - 1."""
  symbols = np.asarray(symbols)
  *rest, inputs, f = symbols.shape
  if symbols.size and (symbols.min() < 0 or symbols.max() >= 1 << bits):
    raise ValueError(f'symbols {symbols.min()}..{symbols.max()} do not fit {bits} bits')
  parts, done = [], 0
  for field in FIELDS[bits]:
    per_word = 32 // field
    values = (symbols.astype(np.uint32) >> done) & ((1 << field) - 1)
    values = np.pad(values, [*[(0, 0)] * len(rest), (0, -inputs % per_word), (0, 0)])
    values = values.reshape(*rest, -1, per_word, f)
    shifts = np.arange(per_word, dtype=np.uint32)[:, None] * np.uint32(field)
    parts.append(np.bitwise_or.reduce(values << shifts, axis=-2))
    done += field
  return np.concatenate(parts, axis=-2)


def unpack(words: Any, inputs: int, bits: int) -> Any:
  """int32 symbols [..., inputs, f] of `pack`ed words; NumPy in, NumPy out."""
  return piece(words, inputs, bits, 0, inputs)


def piece(words: Any, inputs: int, bits: int, first: Any, count: int) -> Any:
  """Symbols of the inputs first .. first + count - 1, [..., count, f].

  Args:
    words: of all `inputs`.
    first: may be traced, and then is a multiple of 32 as `count` is.
  """
  xp: Any = np if isinstance(words, np.ndarray) else jnp
  total, begin, done = None, 0, 0
  for field in FIELDS[bits]:
    per_word = 32 // field
    start, size = begin + first // per_word, -(-count // per_word)
    if xp is np:
      part = words[..., start : start + size, :]
    else:
      part = jax.lax.dynamic_slice_in_dim(words, start, size, words.ndim - 2)
    shifts = (np.arange(per_word, dtype=np.uint32) * np.uint32(field))[:, None]
    shifts = shifts.reshape((1,) * (words.ndim - 1) + shifts.shape)
    values = (part[..., None, :] >> xp.asarray(shifts)) & np.uint32((1 << field) - 1)
    values = values.reshape(*words.shape[:-2], -1, words.shape[-1])[..., :count, :]
    values = values.astype(np.int32) << done
    total = values if total is None else total | values
    begin, done = begin + -(-inputs // per_word), done + field
  return total


def groups(inputs: int, group_size: int) -> int:
  """Groups of inputs that share a scale; one where group_size is 0."""
  return -(-inputs // group_size) if group_size else 1


def inputs_at(
    words_wf: jax.Array, scale_fg: jax.Array, zero_fg: jax.Array, inputs: int, bits: int,
    group_size: int, first: Any, count: int, dtype: Any,
) -> jax.Array:
  """Weights scale (symbol - zero) of the inputs first .. first + count - 1, [count, f].

  A traced `first`, and then `count`, are multiples of 32.
  """
  symbols = piece(words_wf, inputs, bits, first, count)
  scale, zero = (a.astype(jnp.float32).T for a in (scale_fg, zero_fg))
  if group_size:
    group = (first + jnp.arange(count)) // group_size
    scale, zero = scale[group], zero[group]
  return (scale * (symbols.astype(jnp.float32) - zero)).astype(dtype)
