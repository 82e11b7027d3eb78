"""Packed: 2-, 3-, 4- and 8-bit weights with a scale and a zero for each output unit or group."""

from collections.abc import Sequence
import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from kernels_pallas.packed_matmul import layout
from moejax.errors import UserError
from moejax.weights import base


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed(base.WeightNode):
  """Weights scale * (symbol - zero), symbols in 0 .. 2^width - 1.

  Attributes:
    words: uint32 [e, w, rows], see `kernels_pallas.packed_matmul.layout`.
    scale, zero: bf16 or float32 [e, rows, groups]; group j covers inputs j * group_size and on.
    cols: d. width: bits of a symbol, 2, 3, 4 or 8.
    group_size: inputs that share scale and zero; 0 for the whole row.
    single: whether the weight is [d, f], with e = 1.
  """

  words: Any
  scale: Any
  zero: Any
  cols: int = base.static_field()
  width: int = base.static_field()
  group_size: int = base.static_field(default=0)
  single: bool = base.static_field(default=False)

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape, [e, d, f] or [d, f]."""
    e, _, rows = self.words.shape
    return (self.cols, rows) if self.single else (e, self.cols, rows)

  @classmethod
  def from_symbols(
      cls, symbols: np.ndarray, scale: np.ndarray, zero: np.ndarray, *, bits: int,
      group_size: int = 0, level_dtype: Any = ml_dtypes.bfloat16,
  ) -> Self:
    """Packs symbols on the host.

    Args:
      symbols: integers [e, rows, cols] or [rows, cols] in 0 .. 2^bits - 1.
      scale, zero: [e, rows, groups] ([rows, groups]), or without the last axis for whole rows;
        rounded to level_dtype.
      bits: 2, 3, 4 or 8.
      group_size: inputs that share a scale; 0 for the whole row.
      level_dtype: bfloat16, float16 or float32.

    Raises:
      UserError: symbols do not fit the width, or shapes contradict each other.
    """
    symbols, single = base.rows_symbols(symbols)
    e, rows, cols = symbols.shape
    base.require(bits in layout.FIELDS, f'bits = {bits!r}: one of 2, 3, 4, 8')
    levels = [np.asarray(a) for a in (scale, zero)]
    groups = layout.groups(cols, group_size)
    for name, a in zip(('scale', 'zero'), levels):
      base.require(
          a.size == e * rows * groups,
          f'{name} has shape {a.shape}, {e} experts of {rows} rows in {groups} groups need '
          f'{[e, rows, groups]}',
      )
    try:
      words = layout.pack(symbols.swapaxes(1, 2), bits)
    except ValueError as error:
      raise UserError(str(error)) from error
    scale, zero = (a.reshape(e, rows, groups).astype(level_dtype) for a in levels)
    node = cls(
        words=words, scale=scale, zero=zero, cols=cols, width=bits, group_size=group_size,
        single=single,
    )
    node.validate()
    return node

  @staticmethod
  def words_per_column(cols: int, bits: int) -> int:
    """uint32 words of one output unit."""
    return layout.words_per_column(cols, bits)

  def symbols(self) -> np.ndarray:
    """The symbols again, uint8 [e, rows, cols] or [rows, cols]."""
    out = layout.unpack(np.asarray(self.words), self.cols, self.width)
    out = out.astype(np.uint8).swapaxes(1, 2)
    return out[0] if self.single else out

  def take(self, experts: Sequence[int] | np.ndarray, shards: int = 1) -> Self:
    """The node of these experts, in this order (host arrays)."""
    return jax.tree.map(lambda a: np.asarray(a)[np.asarray(experts)], self)

  def validate(self) -> None:
    base.require(
        self.width in layout.FIELDS, f'Packed.width = {self.width!r}: one of 2, 3, 4, 8'
    )
    base.require(
        self.cols >= 1 and self.group_size >= 0,
        f'Packed: cols = {self.cols}, group_size = {self.group_size}',
    )
    words = layout.words_per_column(self.cols, self.width)
    base.require_array(self, 'words', (np.uint32,), (None, words, None))
    e, _, rows = self.words.shape
    groups = layout.groups(self.cols, self.group_size)
    for name in ('scale', 'zero'):
      base.require_array(self, name, base.LEVEL_DTYPES, (e, rows, groups))
    base.require(e >= 1 and (e == 1 or not self.single), f'Packed holds {e} experts')

  def inputs_at(
      self, i: jax.Array | int, first: jax.Array | int, count: int, dtype: Any
  ) -> jax.Array:
    """[count, f] of one expert's [d, f] from the input `first` on; both indices may be traced.

    A traced `first`, and then `count`, are multiples of 32.
    """
    pick = lambda a: jax.lax.dynamic_index_in_dim(jnp.asarray(a), i, 0, keepdims=False)
    return layout.inputs_at(
        pick(self.words), pick(self.scale), pick(self.zero), self.cols, self.width,
        self.group_size, first, count, dtype,
    )

  def expert(self, i: jax.Array | int, dtype: Any) -> jax.Array:
    return self.inputs_at(i, 0, self.cols, dtype)

  def expert_rows(self, i: jax.Array | int, dtype: Any) -> jax.Array:
    return self.expert(i, dtype).T
