"""TernaryV1: ternary experts in the compressed format of QMoE (arXiv 2310.16795)."""

from collections.abc import Sequence
import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moejax.codec import qmoe_v1, ternary_jax
from moejax.weights import base


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TernaryV1(base.WeightNode):
  """Experts as QMoE stores them, the experts of a layer back to back.

  Attributes:
    words: uint16 [w] codewords. They cannot be cut by expert: on a mesh every device holds them
      all (`Ternary` is the format to split).
    row_offsets: uint32 [e, rows + 1] first word of each row in `words`.
    levels: bf16 or float32 [e, rows, 2], minimum and maximum of each quantised row.
    rows, cols: f and d. max_words: codewords of the longest expert.
    single: whether the weight is [d, f], with e = 1.
  """

  words: Any
  row_offsets: Any
  levels: Any
  rows: int = base.static_field()
  cols: int = base.static_field()
  max_words: int = base.static_field()
  single: bool = base.static_field(default=False)

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape, [e, d, f] or [d, f]."""
    one = (self.cols, self.rows)
    return one if self.single else (self.row_offsets.shape[0], *one)

  @classmethod
  def from_symbols(
      cls, symbols: np.ndarray, levels: np.ndarray, *, level_dtype: Any = ml_dtypes.bfloat16
  ) -> Self:
    """Encodes symbols [e, rows, cols] or [rows, cols] and levels [..., rows, 2] on the host.

    The levels are rounded to level_dtype, and the file is the one that QMoE writes for the values
    so made: symbols are taken anew from each row's minimum and maximum. A row whose two levels lie
    on one side of 0, which QMoE never makes, keeps the symbols given.

    Raises:
      UserError: a symbol is not ternary, or shapes do not fit.
    """
    symbols, single = base.rows_symbols(symbols)
    base.require(
        symbols.min() >= 0 and symbols.max() <= 2, 'ternary symbols are 0, 1 and 2'
    )
    levels = base.row_levels(levels, symbols.shape[0], symbols.shape[1], level_dtype)
    coded, extremes = [], []
    for own, level in zip(symbols, levels.astype(np.float32)):
      values = np.where(own == 2, level[:, 1:], np.where(own == 1, level[:, :1], np.float32(0)))
      again, extreme = qmoe_v1.labels(values)
      keep = _not_ternary(again, values)[:, None]
      coded.append(np.where(keep, own, again))
      extremes.append(np.where(keep, level, extreme))
    return cls._encode(coded, np.stack(extremes).astype(level_dtype), single)

  @classmethod
  def from_values(cls, w_erc: np.ndarray, *, level_dtype: Any = ml_dtypes.bfloat16) -> Self:
    """Encodes quantised weights [e, rows, cols], at most {low, 0, high} in each row.

    Raises:
      UserError: a row holds other values than its minimum, its maximum and 0.
    """
    coded, levels = [], []
    for i, w in enumerate(np.asarray(w_erc, np.float32)):
      symbols, level = qmoe_v1.labels(w)
      bad = np.flatnonzero(_not_ternary(symbols, w))
      base.require(
          bad.size == 0,
          f'expert {i}, row {bad[:1]}: more levels than minimum, 0 and maximum; '
          'the QMoE format holds ternary rows without groups',
      )
      coded.append(symbols)
      levels.append(level)
    return cls._encode(coded, np.stack(levels).astype(level_dtype), False)

  @classmethod
  def _encode(cls, symbols: Sequence[np.ndarray], levels: np.ndarray, single: bool) -> Self:
    parts = [qmoe_v1.encode(s) for s in symbols]
    ends = np.cumsum([codes.size for codes, _ in parts])
    base.require(ends[-1] < 2**31, f'{ends[-1]} codewords: encode fewer experts together')
    offsets = [rows + end - codes.size for (codes, rows), end in zip(parts, ends)]
    node = cls(
        words=np.concatenate([codes for codes, _ in parts]),
        row_offsets=np.stack(offsets).astype(np.uint32), levels=levels, rows=levels.shape[1],
        cols=symbols[0].shape[1], max_words=max(codes.size for codes, _ in parts), single=single,
    )
    node._check_structure()
    return node

  def matrix(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One expert as QMoE's tensors: codes, row offsets from 0, interleaved levels [2 rows]."""
    offsets = np.asarray(self.row_offsets)[i].astype(np.int64)
    codes = np.asarray(self.words)[offsets[0] : offsets[-1]]
    levels = np.asarray(self.levels)[i].reshape(-1)
    return codes, (offsets - offsets[0]).astype(np.int32), levels

  def symbols(self) -> np.ndarray:
    """Symbols uint8 [e, rows, cols] or [rows, cols], decoded on the host."""
    parts = [self.matrix(i)[:2] for i in range(self.row_offsets.shape[0])]
    out = np.stack([qmoe_v1.decode(codes, rows, self.cols) for codes, rows in parts])
    return out[0] if self.single else out

  def take(self, experts: Sequence[int] | np.ndarray, shards: int = 1) -> Self:
    """The node of these experts, in this order (host arrays); it keeps all codewords."""
    index = np.asarray(experts)
    offsets = np.asarray(self.row_offsets)[index]
    return dataclasses.replace(
        self, row_offsets=offsets, levels=np.asarray(self.levels)[index],
        max_words=int((offsets[:, -1].astype(np.int64) - offsets[:, 0]).max()),
    )

  def _splits(self, name: str, ways: int) -> bool:
    return name != 'words'

  def _check_structure(self) -> None:
    e = self.row_offsets.shape[0]
    base.require_array(self, 'words', (np.uint16,), (None,))
    base.require_array(self, 'row_offsets', (np.uint32,), (None, self.rows + 1))
    base.require_array(self, 'levels', base.LEVEL_DTYPES, (e, self.rows, 2))
    base.require(e >= 1 and (e == 1 or not self.single), f'TernaryV1 holds {e} experts')
    base.require(
        1 <= self.max_words <= self.words.shape[0] < 2**31,
        f'TernaryV1.max_words = {self.max_words} with {self.words.shape[0]} words',
    )

  def validate(self) -> None:
    self._check_structure()
    if not (base.is_concrete(self.words) and base.is_concrete(self.row_offsets)):
      return
    offsets = np.asarray(self.row_offsets).astype(np.int64)
    longest = int((offsets[:, -1] - offsets[:, 0]).max())
    base.require(
        offsets.max() <= self.words.shape[0] and longest == self.max_words,
        f'TernaryV1.row_offsets reach {offsets.max()} of {self.words.shape[0]} codes, the longest '
        f'expert has {longest}, max_words says {self.max_words}; restore the file',
    )
    for i in range(len(offsets)):
      codes, rows, _ = self.matrix(i)
      qmoe_v1.check(codes, rows, self.cols, name=f'expert {i}')

  def ternary_rows(self, i: jax.Array | int) -> jax.Array:
    """{-1, 0, 1} of one expert, int8 [f, d]; i may be traced."""
    offsets = jax.lax.dynamic_index_in_dim(jnp.asarray(self.row_offsets), i, 0, keepdims=False)
    return qmoe_v1.decode_matrix(
        jnp.asarray(self.words), offsets, rows=self.rows, cols=self.cols, max_words=self.max_words
    )

  def expert_rows(self, i: jax.Array | int, dtype: Any) -> jax.Array:
    levels = jax.lax.dynamic_index_in_dim(jnp.asarray(self.levels), i, 0, keepdims=False)
    return ternary_jax.apply_levels(self.ternary_rows(i), levels.astype(dtype))


def _not_ternary(symbols_rc: np.ndarray, values_rc: np.ndarray) -> np.ndarray:
  """Rows that hold more than minimum, 0 and maximum, bool [rows]."""
  return ((symbols_rc == 0) & (values_rc != 0)).any(1)
