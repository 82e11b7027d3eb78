"""BlockTernary: ternary weights below one bit, in the order in which a kernel decodes them."""

from collections.abc import Sequence
import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from kernels_pallas.subbit_matmul import layout
from kernels_pallas.subbit_matmul.layout import decode, encode
from kernels_pallas.ternary_matmul import layout as two_bit_layout
from moejax.weights import base, packed_ternary
from moejax.weights.ternary import Ternary
from moejax.weights.ternary_v1 import TernaryV1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockTernary(base.WeightNode):
  """Weights in {low, 0, high} of their output unit; see `kernels_pallas.subbit_matmul.layout`.

  Attributes:
    words: uint32 [s, r, 128] codes, r a multiple of 8; shard i of s holds the i-th share of the
      experts. Stored with s = 1; `sharded` makes more, split over a mesh's devices of experts.
    starts: int32 [e, strips] first row of each strip of each expert, all shards counted through.
    records: int32 [e, strips, 1, w], where tiles are, their windows and patches.
    levels: bf16, f16 or float32 [e, 2, c], low and high of each column kept, or [e, 1, c], high,
      where every low is minus its high, which takes one product instead of two.
    homes: uint16 or uint32 [e, tiles, 128], which outputs the columns are.
    rows, cols: f and d.
    block: weights of a block, 4, 8 or 16.
    deep, reach, patches: see `layout.Sizes`.
    single: whether the weight is [d, f], with e = 1.
  """

  words: Any
  starts: Any
  records: Any
  levels: Any
  homes: Any
  rows: int = base.static_field()
  cols: int = base.static_field()
  block: int = base.static_field()
  deep: int = base.static_field()
  reach: tuple[int, int] = base.static_field()
  patches: int = base.static_field()
  single: bool = base.static_field(default=False)

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape, [e, d, f] or [d, f]."""
    one = (self.cols, self.rows)
    return one if self.single else (self.starts.shape[0], *one)

  @property
  def sizes(self) -> layout.Sizes:
    return layout.Sizes(self.cols, self.rows, self.block, self.deep, self.reach, self.patches)

  @classmethod
  def from_signs(cls, signs: np.ndarray, levels: np.ndarray, *, block: int | None = None) -> Self:
    """Encodes on the host.

    Args:
      signs: {-1, 0, 1}, int8 [e, d, f].
      levels: [e, 2, f], low and high of each output, or [e, 1, f], high.
      block: weights of a block, 4, 8 or 16; None for what takes the fewest bits.
    """
    block = encode.size_for(signs[0]) if block is None else block
    base.require(block in layout.SIZES, f'block = {block}, must be one of {layout.SIZES}')
    stack = encode.encode_stack(signs, block)
    e, n, f = levels.shape
    kept = np.zeros((e, n, stack.sizes.tiles * layout.LANES), levels.dtype)
    for i, homes in enumerate(stack.homes_etl):
      kept[i][:, layout.place_of(homes)[:f]] = levels[i]
    whole = np.pad(stack.rows_rl, ((0, -len(stack.rows_rl) % layout.SUBLANES), (0, 0)))
    return cls(
        words=whole[None], starts=stack.starts_es, records=stack.records_es1w, levels=kept,
        homes=stack.homes_etl, rows=f, cols=signs.shape[1], block=block, deep=stack.sizes.deep,
        reach=stack.sizes.reach, patches=stack.sizes.patches,
    )

  @classmethod
  def from_symbols(
      cls, symbols: np.ndarray, levels: np.ndarray, *, block: int | None = None,
      level_dtype: Any = ml_dtypes.bfloat16,
  ) -> Self:
    """Encodes symbols on the host.

    Args:
      symbols: integers [e, rows, cols] or [rows, cols]: 0 zero, 1 low, 2 high.
      levels: [e, rows, 2] or [rows, 2], low and high; rounded to level_dtype.
      block: weights of a block, 4, 8 or 16; None for what takes the fewest bits.
      level_dtype: bfloat16, float16 or float32.

    Raises:
      UserError: a symbol is not ternary, or shapes do not fit.
    """
    signs, levels, single = packed_ternary.signs_and_levels(symbols, levels, level_dtype)
    return dataclasses.replace(cls.from_signs(signs, levels, block=block), single=single)

  @classmethod
  def from_node(cls, node: Ternary | TernaryV1 | packed_ternary.PackedTernary) -> Self:
    """The same weights (host arrays)."""
    two = isinstance(node, packed_ternary.PackedTernary)
    levels = node.row_levels() if two else np.asarray(node.levels)
    return cls.from_symbols(node.symbols(), levels, level_dtype=levels.dtype)

  def two_bit(self) -> packed_ternary.PackedTernary:
    """The same weights at two bits (host arrays)."""
    signs = jax.jit(lambda node, i: node._signs(i))
    words = [
        two_bit_layout.pack(np.asarray(signs(self, i))[None]) for i in range(self.starts.shape[0])
    ]
    levels = [a[:, place] for a, place in zip(np.asarray(self.levels), self._places())]
    return packed_ternary.PackedTernary(
        words=np.concatenate(words), levels=np.stack(levels), cols=self.cols, single=self.single
    )

  def _places(self) -> list[np.ndarray]:
    """Of each expert, the column each output is."""
    return [layout.place_of(homes)[: self.rows] for homes in np.asarray(self.homes)]

  def symbols(self) -> np.ndarray:
    """The symbols again, uint8 [e, rows, cols] or [rows, cols]."""
    return self.two_bit().symbols()

  def row_levels(self) -> np.ndarray:
    """[e, rows, 2], low and high."""
    return self.two_bit().row_levels()

  def take(self, experts: Sequence[int] | np.ndarray, shards: int = 1) -> Self:
    """The node of these experts, in this order, in `shards` rows of codes (host arrays).

    An expert named twice is stored once in a shard.
    """
    flat = np.asarray(self.words).reshape(-1, layout.LANES)
    starts, records = np.asarray(self.starts).astype(np.int64), np.asarray(self.records)
    index, length = np.asarray(experts), self.sizes.tiles * self.sizes.header
    shares, moved = [], np.zeros((index.size, starts.shape[1]), np.int64)
    for own in np.split(np.arange(index.size), shards):
      kept, inverse = np.unique(index[own], return_inverse=True)
      begin = starts[kept, 0]
      rows = starts[kept, -1] + records[kept, -1, 0, length] - begin
      offsets = np.cumsum(rows) - rows
      shares.append(np.concatenate([flat[b : b + n] for b, n in zip(begin, rows)]))
      moved[own] = (starts[kept] - begin[:, None] + offsets[:, None])[inverse]
    # A multiple of what a register holds: a kernel need not copy them to make one.
    longest = -(-max(len(share) for share in shares) // layout.SUBLANES) * layout.SUBLANES
    moved += np.repeat(np.arange(shards), index.size // shards)[:, None] * longest
    base.require(
        moved.max() < 2**31, f'{moved.max()} rows in {shards} shards: 32-bit starts hold 2^31'
    )
    padded = [np.pad(share, ((0, longest - len(share)), (0, 0))) for share in shares]
    return dataclasses.replace(
        self, words=np.stack(padded), starts=moved.astype(np.int32), records=records[index],
        levels=np.asarray(self.levels)[index], homes=np.asarray(self.homes)[index],
    )

  def sharded(self, shards: int) -> Self:
    """The node with its experts' codes in `shards` rows of equal length (host arrays)."""
    if shards == self.words.shape[0]:
      return self
    e = self.starts.shape[0]
    base.require(e % shards == 0, f'{e} experts do not split into {shards} shards')
    return self.take(np.arange(e), shards)

  def _splits(self, name: str, ways: int) -> bool:
    return name != 'words' or self.words.shape[0] % ways == 0

  def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """rows, starts, records, levels and homes, as `kernels_pallas.subbit_matmul` takes them.

    Starts are counted from the first shard that is held: a device's piece of a node knows neither
    how many pieces there are nor which one it is.
    """
    rows = jnp.asarray(self.words).reshape(-1, layout.LANES)
    starts = jnp.asarray(self.starts) % rows.shape[0]
    records, levels, homes = map(jnp.asarray, (self.records, self.levels, self.homes))
    return rows, starts, records, levels, homes

  def validate(self) -> None:
    base.require(
        self.block in layout.SIZES, f'BlockTernary.block = {self.block}, must be {layout.SIZES}'
    )
    sizes, e = self.sizes, self.starts.shape[0]
    base.require_array(self, 'words', (np.uint32,), (None, None, layout.LANES))
    base.require_array(self, 'starts', (np.int32,), (None, sizes.strips))
    base.require_array(
        self, 'records', (np.int32,), (e, sizes.strips, 1, sizes.record)
    )
    base.require_array(
        self, 'levels', base.LEVEL_DTYPES, (e, None, sizes.tiles * layout.LANES)
    )
    base.require(
        self.levels.shape[1] in (1, 2),
        f'BlockTernary.levels has shape {list(self.levels.shape)}, must be [any, 1 or 2, any]',
    )
    base.require_array(self, 'homes', (np.uint16, np.uint32), (e, sizes.tiles, layout.LANES))
    base.require(e >= 1 and (e == 1 or not self.single), f'BlockTernary holds {e} experts')
    if not all(base.is_concrete(a) for a in (self.words, self.starts, self.records, self.homes)):
      return
    self._check_places()

  def _check_places(self) -> None:
    """That rows, windows, patches and homes lie where there is something."""
    sizes, damaged = self.sizes, 'the file is damaged; restore it'
    starts, records = np.asarray(self.starts).astype(np.int64), np.asarray(self.records)[:, :, 0]
    headers = records[:, :, : sizes.tiles * sizes.header]
    headers = headers.reshape(*records.shape[:2], sizes.tiles, sizes.header)
    total, length = self.words.shape[0] * self.words.shape[1], records[:, :, headers[0, 0].size]
    base.require(
        starts.min() >= 0 and (starts + length).max() <= total,
        f'BlockTernary.starts reach row {(starts + length).max()} of {total}: {damaged}',
    )
    firsts = np.concatenate([headers[..., 0], length[..., None]], -1)
    least = layout.class_rows(self.cols, self.block) + 1
    base.require(
        (firsts[..., 0] == 0).all() and (np.diff(firsts) >= least).all()
        and length.max() <= self.deep,
        f'BlockTernary.records: tiles are not {least} rows and more, {self.deep} in all: {damaged}',
    )
    windows = headers[..., 1:-2].view(np.uint32)
    last = np.maximum(windows & 0xFFFF, windows >> 16).max(-1)
    base.require(
        (last < np.diff(firsts)).all(), f'BlockTernary.records: windows past their tiles: {damaged}'
    )
    begin, end = headers[..., -2], headers[..., -1]
    base.require(
        (begin >= 0).all() and (begin <= end).all() and (end <= self.patches).all(),
        f'BlockTernary.records: patches up to {end.max()} of {self.patches}: {damaged}',
    )
    columns = np.arange(sizes.tiles * layout.LANES)
    for i, homes in enumerate(np.asarray(self.homes)):
      fits = homes.max() >> 7 < sizes.tiles
      fits = fits and np.array_equal(np.sort(layout.place_of(homes)), columns)
      base.require(fits, f'BlockTernary.homes of expert {i} are not a permutation: {damaged}')

  def _signs(self, i: jax.Array | int) -> jax.Array:
    """{-1, 0, 1} of one expert, int8 [d, f]."""
    rows, starts, records, _, homes = self.arrays()
    kept = decode.kept_words(rows, starts, records, i, self.sizes)
    halves = two_bit_layout.halves(kept).astype(jnp.int8) // int(two_bit_layout.UNIT)
    signs = layout.from_code(halves, 0, self.cols)
    homes = jax.lax.dynamic_index_in_dim(homes, i, 0, keepdims=False)
    return signs[:, layout.place_of(homes, jnp)[: self.rows]]

  def expert(self, i: jax.Array | int, dtype: Any) -> jax.Array:
    levels, homes = (
        jax.lax.dynamic_index_in_dim(a, i, 0, keepdims=False) for a in self.arrays()[3:]
    )
    levels = levels[:, layout.place_of(homes, jnp)[: self.rows]].astype(dtype)
    low, high = two_bit_layout.low_high(levels)
    signs, zero = self._signs(i), jnp.zeros((), dtype)
    return jnp.where(signs > 0, high, jnp.where(signs < 0, low, zero))

  def expert_rows(self, i: jax.Array | int, dtype: Any) -> jax.Array:
    return self.expert(i, dtype).T
