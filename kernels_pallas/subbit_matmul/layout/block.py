"""Arithmetic of the code of blocks, on int32 arrays of any shape: under Mosaic and in XLA alike.

See `layout` for the code; `form` is that of the block's size.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.subbit_matmul import layout


def shr(a: jax.Array, n: int | jax.Array) -> jax.Array:
  """a >> n, zeros from the left."""
  if isinstance(n, int):
    return a if n == 0 else jax.lax.shift_right_logical(a, jnp.full_like(a, n))
  return jax.lax.shift_right_logical(a, n)


def shl(a: jax.Array, n: int | jax.Array) -> jax.Array:
  if isinstance(n, int):
    return a if n == 0 else jax.lax.shift_left(a, jnp.full_like(a, n))
  return jax.lax.shift_left(a, n)


def times(a: jax.Array, n: int) -> jax.Array:
  """a n by shifts, for a small n."""
  parts = [shl(a, bit) for bit in range(n.bit_length()) if n >> bit & 1]
  return functools.reduce(lambda x, y: x + y, parts)


def _byte(a: jax.Array, i: int) -> jax.Array:
  """Byte i of words."""
  return shr(a, 24) if i == 3 else shr(a, 8 * i) & 255


def classes(words: jax.Array, step: int | jax.Array, form: layout.Form) -> jax.Array:
  """A step's classes, block j's in byte j; a traced step is of the words' shape."""
  every = sum(3 << 8 * j for j in range(form.blocks))
  return shr(words, form.class_shift(step)) & every


def tail_classes(window: jax.Array, lane_step: jax.Array, form: layout.Form, tail: layout.Tail):
  """Words of classes of a tail, from the 32 bits where each lane-step's begin in the stream."""
  words = jnp.zeros_like(window)
  for t in range(tail.steps):
    for j in range(form.blocks):
      kind = shr(window, tail.bits * t + 2 * j) & 3
      if t == tail.steps - 1:
        kind = jnp.where(lane_step < tail.lanes, kind, 0)
      words |= shl(kind, form.class_shift(t) + 8 * j)
  return words


def field_ends(kinds: jax.Array, form: layout.Form) -> jax.Array:
  """In byte j, the bits of the fields of blocks 0 to j."""
  ones = sum(1 << 8 * j for j in range(form.blocks))
  low = kinds & ones
  any_weight = (kinds | shr(kinds, 1)) & ones
  more = any_weight ^ low
  if form.place == 3:  # 3 or 7 bits, without a carry.
    ends = any_weight | shl(any_weight, 1) | shl(more, 2)
  else:
    ends = times(any_weight, form.place) + times(more, form.place + 1)
  ends = ends + shl(ends, 8)
  return ends if form.blocks == 2 else ends + shl(ends, 16)


def field_bits(ends: jax.Array, form: layout.Form) -> jax.Array:
  """Bits of a lane-step's fields."""
  return _byte(ends, form.blocks - 1)


def fields(window: jax.Array, ends: jax.Array, form: layout.Form) -> list[jax.Array]:
  """Each block's field in the lowest bits, from the 32 bits at the lane-step's first field."""
  return [
      shr(window, _byte(ends, j - 1)) if j else window for j in range(form.blocks)
  ]


def pair(field: jax.Array, form: layout.Form) -> tuple[jax.Array, jax.Array]:
  """What a field of class 2 says: the block's bits, and whether there is an entry.

  With an entry, the bits are the block's highest p + 1, in their place.
  """
  p, highest = form.place, 2 * form.size - 2
  a = shl(field, 1) & highest
  b = shr(field, p - 1) & highest
  low = (shr(field, 2 * p - 1) & 2) | 1
  bits = shl(low, a) | shl(jnp.where(a > b, low ^ 2, low), b)
  top = shl(field, form.entry - p)
  top = top & (layout.mask(p + 1) << form.entry if form.size < 16 else -1 << form.entry)
  return jnp.where(a == b, top, bits), a == b


def single(field: jax.Array, kind: jax.Array, form: layout.Form) -> jax.Array:
  """The bits of a block of one weight or none: its class is the weight's bits."""
  return shl(kind, shl(field, 1) & (2 * form.size - 2))


def _merge(codes: list[jax.Array], form: layout.Form) -> list[jax.Array]:
  """Blocks' bits as words; of the marks above a block's bits none is left."""
  per_word = form.blocks // form.words
  words = []
  for first in range(0, form.blocks, per_word):
    parts = []
    for i, code in enumerate(codes[first : first + per_word]):
      clean = code if i == per_word - 1 else code & layout.mask(2 * form.size)
      parts.append(shl(clean, 2 * form.size * i))
    words.append(functools.reduce(lambda a, b: a | b, parts))
  return words


def _without_entries(
    window: jax.Array, kinds: jax.Array, ends: jax.Array, form: layout.Form, pair_of
) -> tuple[list[jax.Array], list[jax.Array]]:
  """The blocks' bits as far as fields say, and all ones for each that has an entry."""
  codes, has = [], []
  for j, field in enumerate(fields(window, ends, form)):
    kind = kinds if j == 0 else shr(kinds, 8 * j)
    kind = kind & 3 if j < form.blocks - 1 else kind
    more = kind == layout.MORE
    bits, entry = pair_of(field)
    codes.append(jnp.where(more, bits, single(field, kind, form)))
    if entry is None:
      has.append(jax.lax.shift_right_arithmetic(codes[-1], jnp.full_like(codes[-1], 31)))
    else:
      has.append(jnp.where(more & entry, -1, 0))
  return codes, has


def decode_step(
    class_words: jax.Array, step: int | jax.Array, starts: tuple[jax.Array, jax.Array],
    form: layout.Form, *, fields_at, entries_at, before, pair_of,
) -> tuple[list[jax.Array], tuple[jax.Array, jax.Array]]:
  """One step's two-bit words, and where the next step's fields and entries start.

  Args:
    class_words: int32 [8, n], of the step and of those that share its words.
    step: its place among those; if traced, of the words' shape.
    starts: int32 [8, n], the same in all rows: bits before the step's fields, and its entries.
    form: of the blocks.
    fields_at, entries_at: give the 32 bits from a bit of each stream on, [8, n] of [8, n]; of
      entries the first bit is the highest.
    before: gives the sum of the rows above each, and of all rows in every row.
    pair_of: gives a class-2 block's bits, and whether it has an entry; None instead, where those
      bits are negative if it has one (for blocks of less than 32 bits).

  Returns words, int32 [8, n] each, in order.
  """
  kinds = classes(class_words, step, form)
  ends = field_ends(kinds, form)
  above, total = before(field_bits(ends, form))
  codes, has = _without_entries(fields_at(starts[0] + above), kinds, ends, form, pair_of)
  takes = [h & form.entry for h in has]
  entry_above, entry_total = before(functools.reduce(lambda a, b: a + b, takes))
  window = entries_at(starts[1] + entry_above)
  for j, h in enumerate(has):
    codes[j] |= shr(window, 32 - form.entry) & h
    window = shl(window, takes[j]) if j + 1 < form.blocks else window
  return _merge(codes, form), (starts[0] + total, starts[1] + entry_total)
