"""PackedTernary: ternary weights at two bits, in the order in which a kernel multiplies them."""

from collections.abc import Sequence
import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from kernels_pallas.ternary_matmul import layout
from moejax.weights import base
from moejax.weights.ternary import Ternary
from moejax.weights.ternary_v1 import TernaryV1


def signs_and_levels(
    symbols: np.ndarray, levels: np.ndarray, level_dtype: Any
) -> tuple[np.ndarray, np.ndarray, bool]:
  """Symbols and levels of rows as signs {-1, 0, 1} [e, d, f] and levels of columns.

  Levels are [e, 2, f], low and high, or [e, 1, f] where every low is minus its high. The last value
  says whether the symbols were of a single matrix.
  """
  symbols, single = base.rows_symbols(symbols)
  e, rows, _ = symbols.shape
  base.require(
      symbols.min() >= 0 and symbols.max() <= 2,
      f'symbols from {symbols.min()} to {symbols.max()}: ternary ones are 0, 1 and 2',
  )
  levels = base.row_levels(levels, e, rows, level_dtype).swapaxes(1, 2)
  symmetric = (levels[:, 0] == -levels[:, 1]).all()
  signs = np.array([0, -1, 1], np.int8)[symbols.swapaxes(1, 2)]
  return signs, np.ascontiguousarray(levels[:, 1:] if symmetric else levels), single


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedTernary(base.WeightNode):
  """Weights in {low, 0, high} of their output unit: speed where there is room for two bits.

  Attributes:
    words: uint32 [e, w, f], see `kernels_pallas.ternary_matmul.layout`.
    levels: bf16, f16 or float32, [e, 2, f], low and high of each output unit; or [e, 1, f], high,
      where every low is minus its high, which takes one product instead of two.
    cols: d.
    single: whether the weight is [d, f], with e = 1.
  """

  words: Any
  levels: Any
  cols: int = base.static_field()
  single: bool = base.static_field(default=False)

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape, [e, d, f] or [d, f]."""
    e, _, f = self.words.shape
    return (self.cols, f) if self.single else (e, self.cols, f)

  @classmethod
  def from_symbols(
      cls, symbols: np.ndarray, levels: np.ndarray, *, level_dtype: Any = ml_dtypes.bfloat16
  ) -> Self:
    """Packs symbols on the host.

    Args:
      symbols: integers [e, rows, cols] or [rows, cols]: 0 zero, 1 low, 2 high.
      levels: [e, rows, 2] or [rows, 2], low and high; rounded to level_dtype.
      level_dtype: bfloat16, float16 or float32.

    Raises:
      UserError: a symbol is not ternary, or shapes do not fit.
    """
    signs, levels, single = signs_and_levels(symbols, levels, level_dtype)
    return cls(words=layout.pack(signs), cols=signs.shape[1], single=single, levels=levels)

  @classmethod
  def from_node(cls, node: Ternary | TernaryV1) -> Self:
    """The same weights (host arrays)."""
    levels = np.asarray(node.levels)
    return cls.from_symbols(node.symbols(), levels, level_dtype=levels.dtype)

  def symbols(self) -> np.ndarray:
    """The symbols again, uint8 [e, rows, cols] or [rows, cols]."""
    signs = layout.unpack(np.asarray(self.words), self.cols).swapaxes(1, 2)
    out = np.array([0, 2, 1], np.uint8)[signs]
    return out[0] if self.single else out

  def row_levels(self) -> np.ndarray:
    """[e, rows, 2], low and high."""
    levels = np.asarray(self.levels)
    return np.stack([levels[:, 0] if levels.shape[1] == 2 else -levels[:, 0], levels[:, -1]], -1)

  def take(self, experts: Sequence[int] | np.ndarray, shards: int = 1) -> Self:
    """The node of these experts, in this order (host arrays)."""
    return jax.tree.map(lambda a: np.asarray(a)[np.asarray(experts)], self)

  def validate(self) -> None:
    base.require(self.cols >= 1, f'PackedTernary: cols = {self.cols}')
    base.require_array(self, 'words', (np.uint32,), (None, layout.words_of(self.cols), None))
    e, _, f = self.words.shape
    base.require_array(self, 'levels', base.LEVEL_DTYPES, (e, None, f))
    base.require(
        self.levels.shape[1] in (1, 2),
        f'PackedTernary.levels has shape {list(self.levels.shape)}, must be [any, 1 or 2, any]',
    )
    base.require(e >= 1 and (e == 1 or not self.single), f'PackedTernary holds {e} experts')

  def expert(self, i: jax.Array | int, dtype: Any) -> jax.Array:
    pick = lambda a: jax.lax.dynamic_index_in_dim(jnp.asarray(a), i, 0, keepdims=False)
    return layout.dense(pick(self.words), pick(self.levels), self.cols, dtype)

  def expert_rows(self, i: jax.Array | int, dtype: Any) -> jax.Array:
    return self.expert(i, dtype).T
