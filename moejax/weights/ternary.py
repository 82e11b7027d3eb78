"""Ternary: weights in {low, 0, high} of their output unit, in the `moejax` codec."""

from collections.abc import Sequence
import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moejax.codec import ternary, ternary_jax, tunstall
from moejax.weights import base


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ternary(base.WeightNode):
  """Ternary experts below one bit a weight; see `codec.ternary` for the format.

  Attributes:
    words: uint16 [s, w] codewords; shard i of s holds the i-th share of the experts. Stored with
      s = 1; `sharded` makes more. On a mesh they are split over the experts' devices if s is a
      multiple of those, with what it takes to pad the shards to the longest; else every device
      holds them all.
    offsets: uint32 [e, blocks + 1] first word of each block of rows, all shards counted through.
    design: uint8 [e] table id of each expert.
    levels: bf16 or float32 [e, rows, 2], low and high of each output unit.
    rows, cols: f and d.
    block_rows: rows that share an offset.
    max_words: codewords of the longest expert.
    designs: the table ids in use.
    single: whether the weight is [d, f], with e = 1.
  """

  words: Any
  offsets: Any
  design: Any
  levels: Any
  rows: int = base.static_field()
  cols: int = base.static_field()
  block_rows: int = base.static_field()
  max_words: int = base.static_field()
  designs: tuple[int, ...] = base.static_field()
  single: bool = base.static_field(default=False)

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape, [e, d, f] or [d, f]."""
    one = (self.cols, self.rows)
    return one if self.single else (self.design.shape[0], *one)

  @classmethod
  def from_symbols(
      cls, symbols: np.ndarray, levels: np.ndarray, *, block_rows: int | None = None,
      level_dtype: Any = ml_dtypes.bfloat16,
  ) -> Self:
    """Encodes symbols on the host.

    Args:
      symbols: integers [e, rows, cols] or [rows, cols]: 0 zero, 1 low, 2 high.
      levels: [e, rows, 2] or [rows, 2], low and high; rounded to level_dtype.
      block_rows: rows that share an offset; None for the default.
      level_dtype: bfloat16, float16 or float32.

    Raises:
      UserError: a symbol is not ternary, or shapes do not fit.
    """
    symbols, single = base.rows_symbols(symbols)
    e, rows, cols = symbols.shape
    levels = base.row_levels(levels, e, rows, level_dtype)
    encoded = ternary.encode(symbols, block_rows=block_rows)
    node = cls(
        words=encoded.words_w[None],
        offsets=encoded.offsets_eb,
        design=encoded.design_e,
        levels=levels,
        rows=rows,
        cols=cols,
        block_rows=encoded.block_rows,
        max_words=_longest(encoded.offsets_eb),
        designs=tuple(int(d) for d in np.unique(encoded.design_e)),
        single=single,
    )
    node._check_structure()
    return node

  def encoded(self) -> ternary.Encoded:
    """The codec's view of the arrays, on the host, in one shard."""
    whole = self.sharded(1)
    return ternary.Encoded(
        words_w=np.asarray(whole.words)[0], offsets_eb=np.asarray(whole.offsets),
        design_e=np.asarray(whole.design), block_rows=self.block_rows,
        shape=(self.design.shape[0], self.rows, self.cols),
    )

  def symbols(self) -> np.ndarray:
    """The symbols again, uint8 [e, rows, cols] or [rows, cols], decoded on the host."""
    out = ternary.decode(self.encoded())
    return out[0] if self.single else out

  def take(self, experts: Sequence[int] | np.ndarray, shards: int = 1) -> Self:
    """The node of these experts, in this order, in `shards` rows of codewords (host arrays).

    An expert named twice is stored once in a shard.
    """
    flat, offsets = np.asarray(self.words).reshape(-1), np.asarray(self.offsets).astype(np.int64)
    index = np.asarray(experts)
    rows, starts = [], np.zeros(index.size, np.int64)
    for own in np.split(np.arange(index.size), shards):
      kept, inverse = np.unique(index[own], return_inverse=True)
      pieces = [flat[offsets[i, 0] : offsets[i, -1]] for i in kept]
      ends = np.cumsum([p.size for p in pieces])
      starts[own] = (ends - [p.size for p in pieces])[inverse]
      rows.append(np.concatenate(pieces))
    longest = max(r.size for r in rows)
    starts += np.repeat(np.arange(shards), index.size // shards) * longest
    moved = offsets[index] - offsets[index, :1] + starts[:, None]
    base.require(
        moved.max() < 2**32, f'{moved.max()} codewords in {shards} shards: 32-bit offsets hold 2^32'
    )
    design = np.asarray(self.design)[index]
    return dataclasses.replace(
        self, words=np.stack([np.pad(r, (0, longest - r.size)) for r in rows]),
        offsets=moved.astype(np.uint32), design=design, levels=np.asarray(self.levels)[index],
        max_words=_longest(moved), designs=tuple(sorted({int(d) for d in design})),
    )

  def sharded(self, shards: int) -> Self:
    """The node with its experts' codewords in `shards` rows of equal length (host arrays)."""
    if shards == self.words.shape[0]:
      return self
    e = self.design.shape[0]
    base.require(e % shards == 0, f'{e} experts do not split into {shards} shards')
    return self.take(np.arange(e), shards)

  def _splits(self, name: str, ways: int) -> bool:
    return name != 'words' or self.words.shape[0] % ways == 0

  def _check_structure(self) -> None:
    e, blocks = self.design.shape[0], -(-self.rows // self.block_rows)
    base.require_array(self, 'words', (np.uint16,), (None, None))
    base.require_array(self, 'offsets', (np.uint32,), (e, blocks + 1))
    base.require_array(self, 'design', (np.uint8,), (None,))
    base.require_array(
        self, 'levels', base.LEVEL_DTYPES, (e, self.rows, 2)
    )
    base.require(e >= 1 and (e == 1 or not self.single), f'Ternary holds {e} experts')
    base.require(
        1 <= self.words.shape[1] < 2**31 and e % self.words.shape[0] == 0,
        f'Ternary.words has shape {list(self.words.shape)} for {e} experts: a shard must hold '
        'fewer than 2^31 codewords of whole experts; call sharded(n)',
    )
    known = len(tunstall.DESIGNS)
    base.require(
        self.designs and all(0 <= d < known for d in self.designs),
        f'Ternary.designs = {self.designs}: this version knows tables 0..{known - 1}; '
        'the file is damaged or from a newer moejax',
    )

  def validate(self) -> None:
    self._check_structure()
    if not all(base.is_concrete(a) for a in (self.words, self.offsets, self.design)):
      return
    offsets = np.asarray(self.offsets).astype(np.int64)
    words, size = np.asarray(self.words).reshape(-1), self.words.shape[1]
    base.require(
        (np.diff(offsets, axis=1) > 0).all() and offsets.max() <= words.size
        and (offsets[:, 0] // size == (offsets[:, -1] - 1) // size).all(),
        f'Ternary.offsets reach word {offsets.max()} of {words.size}, or do not increase: '
        'codes are truncated or offsets damaged; restore the file',
    )
    base.require(
        _longest(offsets) == self.max_words,
        f'Ternary.max_words = {self.max_words}, the longest expert has {_longest(offsets)}',
    )
    design = np.asarray(self.design)
    base.require(
        set(design.tolist()) == set(self.designs),
        f'Ternary.design holds tables {sorted(set(design.tolist()))}, designs says {self.designs}',
    )
    sizes = ternary.block_sizes(self.rows, self.cols, self.block_rows)
    for i, row in enumerate(offsets):
      codes, table = words[row[0] : row[-1]], tunstall.table(int(design[i]))
      ternary.check_blocks(codes, np.diff(row), sizes, table, name=f'expert {i}')

  def locate(
      self, i: jax.Array | int
  ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of one expert (i may be traced): shard, offsets, place of its table in `designs`, levels.

    Shards are counted from the first that is held, offsets from the beginning of the shard: a
    device's piece of a node knows neither how many pieces there are nor which one it is.
    """
    shards, size = self.words.shape
    i = jnp.asarray(i, jnp.int32)
    pick = lambda a: jax.lax.dynamic_index_in_dim(jnp.asarray(a), i, 0, keepdims=False)
    table, offsets = pick(self.tables()), pick(self.offsets)
    shard = offsets[0] // np.uint32(size)
    offsets = offsets - shard * np.uint32(size)
    return (shard % np.uint32(shards)).astype(jnp.int32), offsets, table, pick(self.levels)

  def tables(self) -> jax.Array:
    """Place of each expert's table in `designs`, int32 [e]."""
    place = np.zeros(len(tunstall.DESIGNS), np.int32)
    place[list(self.designs)] = np.arange(len(self.designs))
    return jnp.asarray(place)[jnp.asarray(self.design)]

  def ternary_rows(self, i: jax.Array | int) -> jax.Array:
    """{-1, 0, 1} of one expert, int8 [f, d]; i may be traced."""
    shard, offsets, table, _ = self.locate(i)
    return ternary_jax.decode_matrix(
        jnp.asarray(self.words), shard, offsets, table,
        designs=self.designs, rows=self.rows, cols=self.cols, block_rows=self.block_rows,
        max_words=self.max_words,
    )

  def expert_rows(self, i: jax.Array | int, dtype: Any) -> jax.Array:
    levels = self.locate(i)[3].astype(dtype)
    return ternary_jax.apply_levels(self.ternary_rows(i), levels)


def _longest(offsets_eb: np.ndarray) -> int:
  return int((offsets_eb[:, -1].astype(np.int64) - offsets_eb[:, 0]).max())
