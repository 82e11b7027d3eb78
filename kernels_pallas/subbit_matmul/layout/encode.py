"""Two-bit words into codes of blocks, on the host; see `layout`."""

import functools
from typing import NamedTuple

import numpy as np

from kernels_pallas.subbit_matmul import layout
from kernels_pallas.subbit_matmul.layout.deal import deal
from kernels_pallas.ternary_matmul import layout as two_bit


class Coded(NamedTuple):
  """One expert in codes of blocks of one size.

  Attributes:
    rows: uint32 [r, 128], tile after tile: the tiles of strip 0, of strip 1, ...
    ends: int64 [strips * tiles], rows up to each tile's end.
    fields: int32 [strips * tiles, steps], the first row of its tile that holds a step's fields.
    entries: int32 [strips * tiles, steps], likewise of its entries.
    reach: rows that a step's fields of a tile extend over at most, and its entries.
    homes: uint16 [tiles, 128], see `layout.place_of`; uint32 of more than 65,536 outputs.
    patches: for each tile of each strip, uint32 [p, 2]: row << 7 | lane of a word, and its bits.
  """

  rows: np.ndarray
  ends: np.ndarray
  fields: np.ndarray
  entries: np.ndarray
  reach: tuple[int, int]
  homes: np.ndarray
  patches: list[np.ndarray]


class _Parts(NamedTuple):
  """What is written of blocks: classes, and bits and lengths of fields and entries."""

  classes: np.ndarray
  fields: np.ndarray
  field_bits: np.ndarray
  entries: np.ndarray
  has_entry: np.ndarray


def _written(blocks: np.ndarray, size: int) -> _Parts:
  """Of blocks at two bits a weight, uint32 of any shape."""
  form = layout.Form(size)
  p = form.place
  count = np.zeros(blocks.shape, np.uint8)
  first, last, low_first, low_last = (np.zeros(blocks.shape, np.uint32) for _ in range(4))
  for i in range(size):
    weight = (blocks >> np.uint32(2 * i)) & np.uint32(3)
    there = weight != 0
    new = there & (count == 0)
    first[new], low_first[new] = i, weight[new] >> np.uint32(1)
    last[there], low_last[there] = i, weight[there] >> np.uint32(1)
    count += there
  single, pair, many = count == 1, count == 2, count > 2
  classes = np.where(
      single, np.where(low_first == 1, layout.LOW, layout.HIGH),
      np.where(count > 1, layout.MORE, layout.ZERO),
  ).astype(np.uint32)
  differ = low_first != low_last
  a, b = np.where(differ, last, first), np.where(differ, first, last)
  low_a = np.where(differ, low_last, low_first)
  two = a | b << np.uint32(p) | low_a << np.uint32(2 * p)
  top = blocks >> np.uint32(form.entry)
  three = top & np.uint32(layout.mask(p)) | top << np.uint32(p)
  fields = np.where(single, first, np.where(pair, two, np.where(many, three, 0))).astype(np.uint32)
  bits = np.where(single, p, np.where(count > 1, 2 * p + 1, 0)).astype(np.int8)
  entries = np.where(many, blocks & np.uint32(layout.mask(form.entry)), 0).astype(np.uint32)
  return _Parts(classes, fields, bits, entries, many)


@functools.cache
def _table(size: int) -> _Parts:
  return _written(np.arange(1 << 2 * size, dtype=np.uint32), size)


def _parts(blocks: np.ndarray, size: int) -> _Parts:
  if 2 * size > 16:
    return _written(blocks, size)
  return _Parts(*(column[blocks] for column in _table(size)))


class _Stream(NamedTuple):
  """Pieces of bits of every column, and where they are: of one strip.

  values, at: [pieces, columns]; bits: how many, 0 where there is no piece. lengths: [columns].
  """

  values: np.ndarray
  at: np.ndarray
  bits: np.ndarray
  lengths: np.ndarray

  def words(self, *, highest: bool = False) -> np.ndarray:
    """[words, columns] uint32, word 0 first; from the lowest bit of each on, or the highest."""
    columns = self.lengths.size
    piece, column = np.nonzero(self.bits)
    at, values = self.at[piece, column], self.values[piece, column].astype(np.uint64)
    if highest:
      from_top = 64 - at % 32 - self.bits[piece, column]
      shifted = values << from_top.astype(np.uint64)
      shifted = shifted >> np.uint64(32) | shifted << np.uint64(32)
    else:
      shifted = values << (at % 32).astype(np.uint64)
    place = at // 32 * columns + column
    size = (int(self.lengths.max()) // 32 + 2) * columns
    # Pieces do not overlap: sums stay below 2^32, which a float64 holds.
    low = np.bincount(place, weights=shifted & np.uint64(0xFFFFFFFF), minlength=size)
    high = np.bincount(place + columns, weights=shifted >> np.uint64(32), minlength=size)
    return (low + high).astype(np.uint32).reshape(-1, columns)

  def reach(self, steps: int, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last word of each step's pieces of these columns; 0 where there are none."""
    bits = self.bits[:, columns].reshape(steps, -1, columns.size).sum(1)
    starts = self.at[:, columns].reshape(steps, -1, columns.size)[:, 0]
    last = np.where(bits > 0, starts + bits - 1, 0).max(1)
    first = np.where(bits > 0, starts, last[:, None]).min(1)
    return first // 32, last // 32


def _stream(values: np.ndarray, bits: np.ndarray, begin: int = 0) -> _Stream:
  """From [steps, 8, blocks, columns], after `begin` bits of something else."""
  columns = bits.shape[-1]
  values, bits = values.reshape(-1, columns), bits.reshape(-1, columns).astype(np.int64)
  ends = begin + np.cumsum(bits, axis=0)
  return _Stream(values, ends - bits, bits, ends[-1])


def _class_words(classes: np.ndarray, form: layout.Form) -> np.ndarray:
  """[8 groups, columns] from [steps, 8, blocks, columns]."""
  groups = -(-len(classes) // form.together)
  words = np.zeros((layout.SUBLANES * groups, classes.shape[-1]), np.uint32)
  for t, step in enumerate(classes):
    first = t // form.together * layout.SUBLANES
    for j in range(form.blocks):
      shift = np.uint32(form.class_shift(t) + 8 * j)
      words[first : first + layout.SUBLANES] |= step[:, j] << shift
  return words


def _tail_words(words: np.ndarray, form: layout.Form, tail: layout.Tail) -> np.ndarray:
  """A tail's classes [8, columns] as its stream has them: a step's together, step after step."""
  out = np.zeros_like(words)
  for t in range(tail.steps):
    for j in range(form.blocks):
      kind = words >> np.uint32(form.class_shift(t) + 8 * j) & np.uint32(3)
      out |= kind << np.uint32(tail.bits * t + 2 * j)
  return out


def _tail_stream(
    words: np.ndarray, form: layout.Form, tail: layout.Tail, depth: int
) -> np.ndarray:
  """The tail's classes at the beginning of an otherwise empty stream, [depth, columns]."""
  lanes = np.arange(layout.SUBLANES)
  at = np.broadcast_to(tail.at(lanes)[:, None], words.shape)
  bits = np.broadcast_to(np.diff(tail.at(np.arange(layout.SUBLANES + 1)))[:, None], words.shape)
  lengths = np.full(words.shape[1], tail.end)
  made = _Stream(_tail_words(words, form, tail), at, bits, lengths).words()
  return np.pad(made, ((0, max(0, depth - len(made))), (0, 0)))[:depth]


def encode(words_wf: np.ndarray, d: int, size: int) -> Coded:
  """Codes one expert's two-bit words, uint32 [words_of(d), f], in blocks of `size` weights.

  The inputs of the words are in the order of `layout.in_code`.
  """
  form = layout.Form(size)
  f = words_wf.shape[1]
  tiles = layout.tiles_of(f)
  columns = tiles * layout.LANES
  blocks = layout.blocks_of(
      np.pad(layout.strips(words_wf, d), ((0, 0), (0, 0), (0, columns - f))), size
  )  # [strips, steps, 8, blocks, columns]
  steps, head, tail = blocks.shape[1], layout.class_rows(d, size), layout.tail_of(d, size)
  parts = _parts(blocks, size)
  # Entries that a lane-step has no room for.
  over = parts.has_entry & (np.cumsum(parts.has_entry, axis=3) > form.entries)
  classes = np.where(over, np.uint32(layout.ZERO), parts.classes)
  field_bits = np.where(over, 0, parts.field_bits)
  entry_bits = np.where(parts.has_entry & ~over, form.entry, 0)
  fields = [_stream(*a, tail.end) for a in zip(parts.fields, field_bits)]
  entries = [_stream(*a) for a in zip(parts.entries, entry_bits)]

  used = [-(-(a.lengths + b.lengths) // 32) for a, b in zip(fields, entries)]
  # Columns of one length with like fields are together: they need narrower windows.
  tile, lane = deal(np.lexsort((np.sum([a.lengths for a in fields], axis=0), np.sum(used, axis=0))))
  columns_of = np.empty((tiles, layout.LANES), np.int64)
  columns_of[tile, lane] = np.arange(columns)

  rows, ends, first, patches, reach = [], [], [], [], np.ones((2, 1), np.int64)
  for i, both in enumerate(zip(fields, entries)):
    words = [both[0].words(), both[1].words(highest=True)]
    heads = _class_words(classes[i], form)
    if tail.steps:
      words[0] = words[0] + _tail_stream(heads[head:], form, tail, len(words[0]))
    for own in columns_of:
      deep = max(1, int(used[i][own].max()))
      body = np.zeros((deep, layout.LANES), np.uint32)
      for part, order in zip(words, (slice(None), slice(None, None, -1))):
        kept = part[:deep, own]
        body[order][: len(kept)] |= kept
      rows += [heads[:head, own], body]
      ends.append(head + deep)
      (low_f, high_f), (low_e, high_e) = (stream.reach(steps, own) for stream in both)
      reach = np.maximum(reach, [[(high_f - low_f).max() + 1], [(high_e - low_e).max() + 1]])
      first.append((head + np.minimum(low_f, deep - 1), head + np.maximum(deep - 1 - high_e, 0)))
      patches.append(_patches(blocks[i][..., own], over[i][..., own], form))
  first_fields, first_entries = np.array(first, np.int32).swapaxes(0, 1)
  return Coded(
      rows=np.concatenate(rows), ends=np.cumsum(ends), fields=first_fields, entries=first_entries,
      reach=(int(reach[0, 0]), int(reach[1, 0])), homes=layout.homes(tile, lane), patches=patches,
  )


def _patches(blocks: np.ndarray, over: np.ndarray, form: layout.Form) -> np.ndarray:
  """Places and words [p, 2] that restore blocks that found no room: of a tile's [steps, 8, b, 128].

  A word of two of them has two patches. They are padded with such of no bits.
  """
  step, lane_step, block, lane = np.nonzero(over)
  word, shift = block * form.size // 16, block * form.size % 16 * 2
  row = (step * form.words + word) * layout.SUBLANES + lane_step
  made = np.stack([row << 7 | lane, blocks[over].astype(np.uint64) << shift.astype(np.uint64)], 1)
  return np.pad(made.astype(np.uint32), ((0, -len(made) % layout.PATCHES_AT_ONCE), (0, 0)))


def words_of(signs_df: np.ndarray) -> np.ndarray:
  """Two-bit words of one expert, its inputs in the order of the code: uint32 [w, f]."""
  return two_bit.pack(layout.in_code(signs_df, 0)[None])[0]


def size_for(signs_df: np.ndarray) -> int:
  """The block size that takes the fewest bits for one expert, but for what tiles add."""
  words_wf = words_of(signs_df)

  def bits(size: int) -> int:
    form = layout.Form(size)
    blocks = layout.blocks_of(words_wf[None], size)
    parts = _parts(blocks, size)
    kept = np.minimum(parts.has_entry.sum(3), form.entries)
    over = parts.has_entry.sum() - kept.sum()
    fields = parts.field_bits.sum(dtype=np.int64)
    return int(2 * blocks.size + fields + form.entry * kept.sum() + 64 * over)

  return min(layout.SIZES, key=bits)


class Stack(NamedTuple):
  """Experts in codes: the arrays and sizes that `api.subbit_matmul` takes."""

  rows_rl: np.ndarray
  starts_es: np.ndarray
  records_es1w: np.ndarray
  homes_etl: np.ndarray
  sizes: layout.Sizes


def encode_stack(signs_edf: np.ndarray, size: int) -> Stack:
  """Codes experts' signs {-1, 0, 1}, int8 [e, d, f]; an expert at a time."""
  d, f = signs_edf.shape[1:]
  experts = [encode(words_of(signs), d, size) for signs in signs_edf]
  strips, tiles = layout.strips_of(d), layout.tiles_of(f)
  per_strip = [
      [coded.patches[i * tiles : (i + 1) * tiles] for i in range(strips)] for coded in experts
  ]
  patches = max(sum(map(len, of_tiles)) for coded in per_strip for of_tiles in coded)
  sizes = layout.Sizes(d, f, size, 0, (0, 0), patches)
  records = np.zeros((len(experts), strips, sizes.record), np.int64)
  starts, first = np.zeros((len(experts), strips), np.int64), 0
  for e, coded in enumerate(experts):
    ends = np.concatenate([[0], coded.ends])
    starts[e] = first + ends[:-1:tiles]
    for i in range(strips):
      of_strip = slice(i * tiles, (i + 1) * tiles)
      headers = records[e, i, : tiles * sizes.header].reshape(tiles, sizes.header)
      headers[:, 0] = ends[of_strip] - ends[i * tiles]
      steps = coded.fields.shape[1]
      headers[:, 1 : 1 + steps] = coded.fields[of_strip] | coded.entries[of_strip] << 16
      headers[:, -1] = np.cumsum([len(p) for p in per_strip[e][i]])
      headers[1:, -2] = headers[:-1, -1]
      rest = records[e, i, tiles * sizes.header :]
      rest[0] = ends[(i + 1) * tiles] - ends[i * tiles]
      listed = np.concatenate(per_strip[e][i]).reshape(-1)
      rest[1 : 1 + len(listed)] = listed
    first += ends[-1]
  fields, entries = (max(coded.reach[i] for coded in experts) for i in range(2))
  deep = int(records[:, :, tiles * sizes.header].max())
  return Stack(
      rows_rl=np.concatenate([coded.rows for coded in experts]),
      starts_es=starts.astype(np.int32),
      records_es1w=records[:, :, None].astype(np.uint32).view(np.int32),
      homes_etl=np.stack([coded.homes for coded in experts]),
      sizes=sizes._replace(deep=deep, reach=(fields, entries)),
  )
