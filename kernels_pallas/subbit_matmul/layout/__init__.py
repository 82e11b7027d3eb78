"""Ternary weights below one bit in codes of blocks, which arithmetic alone decodes.

Weights lie in the words of `ternary_matmul.layout`, 16 at two bits, after the inputs were put in
another order (`in_code`): of w words the i-th holds the inputs i, i + w, .., i + 15 w, for weights
near each other are as dense as each other after GPTQ, and blocks of one density cost most; words
2 s and 2 s + 1 of each 16 are words s and s + 8 of their 256 inputs. A word holds blocks of
`size` = 4, 8 or 16 weights, 2 size bits each; p = log2(size). Of a block is written

    class   2 bits                  0 all zero, 1 one high, 3 one low, 2 more
    field   p bits                  of classes 1 and 3: where the weight is
            2 p + 1 bits            of class 2: places a (low bits), b and a sign s.
                                    a != b: two weights, a is low if s, b if s xor (a > b)
                                    a == b: three or more; b and s are the block's highest bits
    entry   2 size - p - 1 bits     of three or more: the other bits of the block

so every block can be written, and what a block takes is known from its class and field. A step is
eight words below each other of each of 128 columns, two times where blocks are of 8 or 16: word s
of it and the s-th after those make up lane-step s. A tile is 128 columns of a strip, of up to
`STRIP` inputs; its rows of 128 words are

    classes   8 rows for each whole group of 16 / blocks steps; row s: in byte j, steps apart by 2
              bits, block j's class
    streams   of each column, bit after bit from the lowest of a word, in words from the first on:
              the classes of the steps that are left, of lane-step 0 step after step and block
              after block, of lane-step 1, .., as far as there are inputs; the fields of step 0
              (lane-step 0, block 0, 1, ..; lane-step 1, ..), of step 1, .. From the last word
              back the entries, likewise, bit after bit from the highest

A lane-step has room for `ENTRIES` entries, so that 32 bits hold them. Blocks past that are written
as zeros and restored from the tile's list of patches: words and where they belong. Columns are
dealt to tiles by the length of their streams; see `deal`.
"""

from typing import Any, NamedTuple

import numpy as np

from kernels_pallas.ternary_matmul import layout as two_bit

LANES = 128
SUBLANES = 8
STRIP = 8192  # Inputs.
SIZES = (4, 8, 16)
ENTRIES = {4: 4, 8: 2, 16: 1}
PATCHES_AT_ONCE = 4  # A tile has a multiple of so many, the last of no bits.
ZERO, HIGH, MORE, LOW = range(4)


class Form(NamedTuple):
  """What follows from a block's size: blocks and words of a lane-step, and bits."""

  size: int

  @property
  def place(self) -> int:
    """p, bits of a place."""
    return self.size.bit_length() - 1

  @property
  def blocks(self) -> int:
    return 2 if self.size == 16 else 4

  @property
  def words(self) -> int:
    return self.blocks * self.size // 16

  @property
  def entry(self) -> int:
    return 2 * self.size - self.place - 1

  @property
  def entries(self) -> int:
    return ENTRIES[self.size]

  @property
  def inputs(self) -> int:
    """Inputs of a step."""
    return self.words * SUBLANES * 16

  @property
  def together(self) -> int:
    """Steps whose classes are in one word."""
    return 16 // self.blocks

  def class_shift(self, step: Any) -> Any:
    """Where in a word the classes of a step's block 0 are."""
    step = step % self.together
    return 2 * (step % 4) + 16 * (step // 4)


def strips_of(d: int) -> int:
  return max(1, -(-d // STRIP))


def depth_of(d: int) -> int:
  """Inputs a strip: as many whole chunks as leave the least of the last strip empty."""
  chunks = -(-d // two_bit.CHUNK)
  return -(-chunks // strips_of(d)) * two_bit.CHUNK


def tiles_of(f: int) -> int:
  return -(-f // LANES)


def steps_of(d: int, size: int) -> int:
  """Steps of a strip."""
  return depth_of(d) // Form(size).inputs


class Tail(NamedTuple):
  """The steps of a strip after its last whole group.

  Attributes:
    group: the whole groups before it.
    steps: its steps, 0 to `together` - 1.
    lanes: of the last one, lane-steps that have inputs.
    bits: of the classes of one step.
  """

  group: int
  steps: int
  lanes: int
  bits: int

  def at(self, lane_step: Any, xp: Any = np) -> Any:
    """The bit of the stream at which a lane-step's classes start."""
    return self.bits * (lane_step * (self.steps - 1) + xp.minimum(lane_step, self.lanes))

  @property
  def end(self) -> int:
    return int(self.at(SUBLANES)) if self.steps else 0


def tail_of(d: int, size: int) -> Tail:
  """The tail of every strip: the last one is taken to have as many inputs as the others."""
  form = Form(size)
  group, steps = divmod(steps_of(d, size), form.together)
  inputs = depth_of(d) if strips_of(d) > 1 else d
  # Inputs of the last chunk, 32 a lane-step; where a step is one of its two words, after the first.
  left = inputs - (depth_of(d) - two_bit.CHUNK) - 16 * (2 - form.words)
  return Tail(group, steps, max(0, -(-left // 32)), 2 * form.blocks)


def class_rows(d: int, size: int) -> int:
  """Rows of classes of a tile."""
  return SUBLANES * tail_of(d, size).group


def in_code(a: Any, axis: int, xp: Any = np) -> Any:
  """Inputs in the order of the code, along an axis that gets padded with zeros to whole strips."""
  d, before, after = a.shape[axis], a.shape[:axis], a.shape[axis + 1 :]
  words = -(-d // 16)
  a = _padded(a, axis, 16 * words, xp).reshape(*before, 16, words, *after).swapaxes(axis, axis + 1)
  a = _padded(a.reshape(*before, -1, *after), axis, strips_of(d) * depth_of(d), xp)
  return _reordered(a, axis, (SUBLANES, 2, 8, 2))


def from_code(a: Any, axis: int, d: int) -> Any:
  """The d inputs again, from whole strips of the code."""
  a, before, after = _reordered(a, axis, (8, 2, SUBLANES, 2)), a.shape[:axis], a.shape[axis + 1 :]
  words, first = -(-d // 16), (slice(None),) * axis
  a = a[(*first, slice(16 * words))].reshape(*before, words, 16, *after).swapaxes(axis, axis + 1)
  return a.reshape(*before, -1, *after)[(*first, slice(d))]


def _padded(a: Any, axis: int, size: int, xp: Any) -> Any:
  return xp.pad(a, [(0, size - n) if i == axis else (0, 0) for i, n in enumerate(a.shape)])


def _reordered(a: Any, axis: int, shape: tuple[int, ...]) -> Any:
  """Each 256 along the axis, as of this shape, with the first and the third of its axes swapped."""
  before, after = a.shape[:axis], a.shape[axis + 1 :]
  split = a.reshape(*before, -1, *shape, *after)
  return split.swapaxes(axis + 1, axis + 3).reshape(a.shape)


def homes(tile_c: np.ndarray, lane_c: np.ndarray) -> np.ndarray:
  """[tiles, 128] of the tile and the lane of each output's column: tile << 7 | lane.

  Of 128 outputs that follow each other, no two are in one lane: the lowest bits in place c say in
  which lane output c is, the others in which tile the one is that is in lane c.
  """
  tiles = tile_c.size // LANES
  lanes = lane_c.reshape(tiles, LANES)
  by_lane = np.empty_like(lanes)
  np.put_along_axis(by_lane, lanes, tile_c.reshape(tiles, LANES), axis=1)
  return (by_lane << 7 | lanes).astype(np.uint16 if tiles <= 512 else np.uint32)


def place_of(homes_tl: Any, xp: Any = np) -> Any:
  """Of each output, the column it is kept in, int32 [tiles * 128]."""
  homes_tl = homes_tl.astype(xp.int32)
  lane = homes_tl & (LANES - 1)
  return (xp.take_along_axis(homes_tl >> 7, lane, axis=1) * LANES + lane).reshape(-1)


def header_words(d: int, size: int) -> int:
  """Words of a tile in a strip's record: first row, windows of each step, patches from and to."""
  together = Form(size).together
  return 3 + -(-steps_of(d, size) // together) * together


def mask(bits: int) -> int:
  return (1 << bits) - 1


class Sizes(NamedTuple):
  """What programs depend on, beside the shapes of arrays.

  Attributes:
    d, f: inputs and outputs.
    size: weights of a block.
    deep: rows of the longest strip of an expert.
    reach: see `encode.Coded`.
    patches: of the strip with most.
  """

  d: int
  f: int
  size: int
  deep: int
  reach: tuple[int, int]
  patches: int

  @property
  def form(self) -> Form:
    return Form(self.size)

  @property
  def strips(self) -> int:
    return strips_of(self.d)

  @property
  def tiles(self) -> int:
    return tiles_of(self.f)

  @property
  def groups(self) -> int:
    """Groups of steps that share words of classes, the last one perhaps not whole."""
    return -(-steps_of(self.d, self.size) // self.form.together)

  @property
  def tail(self) -> Tail:
    return tail_of(self.d, self.size)

  @property
  def windows(self) -> tuple[int, int]:
    """Registers that hold any run of `reach` rows."""
    fields, entries = (-(-(rows + SUBLANES - 1) // SUBLANES) for rows in self.reach)
    return fields, entries

  @property
  def registers(self) -> int:
    """Registers of rows that a grid step sees."""
    return -(-(self.deep + SUBLANES - 1) // SUBLANES) + max(self.windows)

  @property
  def header(self) -> int:
    return header_words(self.d, self.size)

  @property
  def record(self) -> int:
    """Words of a strip's record: tiles' headers, the row past the last, two words a patch."""
    return self.tiles * self.header + 1 + 2 * self.patches

  @property
  def inputs(self) -> int:
    """Inputs of a strip as the kernel sees it."""
    return self.groups * self.form.together * self.form.inputs


def strips(words_wf: Any, d: int, xp: Any = np) -> Any:
  """[strips, depth / 16, f] from two-bit words [w, f]."""
  n, rows = strips_of(d), depth_of(d) // 16
  return xp.pad(words_wf, ((0, n * rows - words_wf.shape[0]), (0, 0))).reshape(n, rows, -1)


def blocks_of(words_nrf: Any, size: int) -> Any:
  """[n, steps, 8, blocks, f] of 2 size bits, from strips [n, rows, f]."""
  form = Form(size)
  n, _, f = words_nrf.shape
  words = words_nrf.reshape(n, -1, form.words, SUBLANES, f)
  split = 16 // size
  parts = [
      (words[:, :, i] >> np.uint32(2 * size * j)) & np.uint32(mask(2 * size))
      for i in range(form.words) for j in range(split)
  ]
  return np.stack(parts, axis=3)
