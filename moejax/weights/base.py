"""What every compressed weight node has: arrays, small static fields, exact size, specs."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, Self

import jax
from jax.sharding import Mesh, PartitionSpec
import ml_dtypes
import numpy as np

from moejax.errors import UserError

LEVEL_DTYPES = (ml_dtypes.bfloat16, np.float16, np.float32)


def array_field() -> Any:
  """A dataclass field that holds an array, a ShapeDtypeStruct or a PartitionSpec."""
  return dataclasses.field()


def static_field(**kwargs) -> Any:
  """A small hashable field that is part of the tree structure."""
  return dataclasses.field(metadata={'static': True}, **kwargs)


def nbits(leaf: Any) -> int:
  """Bits of an array or a ShapeDtypeStruct."""
  return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize * 8


def is_concrete(leaf: Any) -> bool:
  """Whether a leaf's values can be read on the host."""
  return isinstance(leaf, np.ndarray) or (
      isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
  )


def require(condition: Any, message: str) -> None:
  """Raises UserError(message) unless the condition holds."""
  if not condition:
    raise UserError(message)


def require_array(node: Any, name: str, dtypes: tuple[Any, ...], shape: tuple[Any, ...]) -> None:
  """Checks an array's dtype, rank and sizes (None: any size) against what the node needs."""
  leaf = getattr(node, name)
  where = f'{type(node).__name__}.{name}'
  require(
      np.dtype(leaf.dtype) in [np.dtype(d) for d in dtypes],
      f'{where} is {np.dtype(leaf.dtype)}, must be {" or ".join(str(np.dtype(d)) for d in dtypes)}',
  )
  fits = len(leaf.shape) == len(shape) and all(
      want is None or have == want for have, want in zip(leaf.shape, shape)
  )
  wanted = '[' + ', '.join('any' if n is None else str(n) for n in shape) + ']'
  require(fits, f'{where} has shape {list(leaf.shape)}, must be {wanted}')


class WeightNode:
  """Stands for a weight [e, d, f] or, with `single`, [d, f]; its subclasses are dataclasses.

  A row of the codecs is an output unit, the last axis here: `rows` = f and `cols` = d.
  """

  @classmethod
  def _names(cls, static: bool) -> list[str]:
    return [
        f.name for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.metadata.get('static', False) == static
    ]

  @property
  def size(self) -> int:
    """Logical weights."""
    return math.prod(self.shape)  # type: ignore[attr-defined]

  @property
  def parameters(self) -> int:
    """Weights that inputs are multiplied with: of a factored weight those of its factors."""
    return self.size

  def bits(self) -> int:
    """Stored bits, all metadata counted."""
    return sum(nbits(leaf) for leaf in jax.tree.leaves(self))

  def bits_per_weight(self) -> float:
    """Stored bits a logical weight."""
    return self.bits() / self.size

  def to_arrays(self) -> dict[str, np.ndarray]:
    """The array fields by name, on the host, in one shard."""
    whole = self.sharded(1)
    return {name: np.asarray(getattr(whole, name)) for name in self._names(static=False)}

  def static(self) -> dict[str, Any]:
    """The static fields as JSON values."""
    values = {name: getattr(self, name) for name in self._names(static=True)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

  @classmethod
  def from_arrays(cls, static: Mapping[str, Any], arrays: Mapping[str, Any]) -> Self:
    """The node again, checked.

    Raises:
      UserError: fields are missing or unknown, or the arrays contradict each other.
    """
    want, have = set(cls._names(static=False)), set(arrays)
    require(
        want == have,
        f'{cls.__name__}: arrays {sorted(have)} found, {sorted(want)} needed; restore the folder',
    )
    want, have = set(cls._names(static=True)), set(static)
    require(
        want == have,
        f'{cls.__name__}: static fields {sorted(have)} found, {sorted(want)} needed; '
        'the manifest is from another version',
    )
    fixed = {k: tuple(v) if isinstance(v, list) else v for k, v in static.items()}
    node = cls(**fixed, **arrays)
    node.validate()
    return node

  def validate(self) -> None:
    """Raises UserError if the arrays contradict each other or the static fields."""

  def specs(self, mesh: Mesh | None = None) -> Self:
    """The node with a PartitionSpec for each array: its experts over the mesh axis 'expert'.

    A device's own piece is again a node, of that device's experts. All devices of the axes 'data'
    and 'tensor' hold the same pieces. A node whose experts that mesh axis does not divide, or of a
    single matrix, is whole everywhere.
    """
    ways = 1 if mesh is None else mesh.shape['expert']
    split = ways > 1 and not self.single and self.shape[0] % ways == 0  # type: ignore[attr-defined]
    return dataclasses.replace(self, **{  # type: ignore[type-var]
        name: PartitionSpec('expert') if split and self._splits(name, ways) else PartitionSpec()
        for name in self._names(static=False)
    })

  def _splits(self, name: str, ways: int) -> bool:
    """Whether a field's leading axis can be cut into `ways` pieces, each for its experts."""
    return True

  def sharded(self, shards: int) -> Self:
    """The same weights, laid out on the host so that `specs` splits all that it can.

    Each piece may be padded to the longest: a layout for devices. It is stored whole again.
    """
    return self

  def dense(self, dtype: Any) -> jax.Array:
    """All weights, [e, d, f] or [d, f]; experts are decoded one after another."""
    if self.single:  # type: ignore[attr-defined]
      return self.expert(0, dtype)
    experts = np.arange(self.shape[0])  # type: ignore[attr-defined]
    return jax.lax.map(lambda i: self.expert(i, dtype), experts)

  def expert(self, i: jax.Array | int, dtype: Any) -> jax.Array:
    """One expert's matrix [d, f]; i may be traced."""
    return self.expert_rows(i, dtype).T

  def expert_rows(self, i: jax.Array | int, dtype: Any) -> jax.Array:
    """The same as rows of outputs, [f, d]: the order in which it is stored."""
    raise NotImplementedError


def rows_symbols(symbols: np.ndarray) -> tuple[np.ndarray, bool]:
  """[e, rows, cols] and whether the input was a single [rows, cols]."""
  symbols = np.asarray(symbols)
  single = symbols.ndim == 2
  symbols = symbols[None] if single else symbols
  require(
      symbols.ndim == 3 and 0 not in symbols.shape,
      f'symbols have shape {symbols.shape}; [experts, rows, cols] or [rows, cols] is needed',
  )
  return symbols, single


def row_levels(levels: np.ndarray, experts: int, rows: int, dtype: Any) -> np.ndarray:
  """Levels (low, high) as [e, rows, 2] of `dtype`, from [e, rows, 2] or, for one, [rows, 2]."""
  levels = np.asarray(levels)
  fits = levels.shape == (experts, rows, 2) or (experts == 1 and levels.shape == (rows, 2))
  require(fits, f'levels have shape {list(levels.shape)}, must be {[experts, rows, 2]}')
  return levels.reshape(experts, rows, 2).astype(dtype)
