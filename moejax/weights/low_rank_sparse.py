"""LowRankSparse: W = left right + rest, of whose outputs only some are kept (LoSparse, MC-SMoE)."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from moejax.weights import base
from moejax.weights.block_ternary import BlockTernary
from moejax.weights.mixed import Mixed
from moejax.weights.packed import Packed
from moejax.weights.packed_ternary import PackedTernary
from moejax.weights.ternary import Ternary
from moejax.weights.ternary_v1 import TernaryV1

KEPT_CLASSES: dict[str, type[base.WeightNode]] = {
    c.__name__: c for c in (Ternary, TernaryV1, Packed, PackedTernary, BlockTernary, Mixed)
}
_ARRAY = 'array'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankSparse(base.WeightNode):
  """W[:, j] = (left right)[:, j], plus a column of `kept` for the outputs that `index` names.

  (LoSparse, arXiv 2306.11222, eq. 4; rows of a PyTorch weight are outputs, columns here.)

  Attributes:
    left: [e, d, r]. right: [e, r, f].
    kept: what is left of the rest, [e, d, s], an array or a weight node; s is that of the expert
      that keeps most.
    index: int32 [e, s], the output of each column of `kept`, rising; f where an expert has fewer.
  """

  left: Any
  right: Any
  kept: Any
  index: Any

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape [e, d, f]."""
    return (*self.left.shape[:2], self.right.shape[2])

  @property
  def parameters(self) -> int:
    return sum(math.prod(a.shape) for a in (self.left, self.right, self.kept))

  @property
  def single(self) -> bool:
    """Always stacked."""
    return False

  @classmethod
  def from_dense(
      cls, left_edr: np.ndarray, right_erf: np.ndarray, rest_edf: np.ndarray, keep_ef: np.ndarray,
      dtype: Any = None,
  ) -> Self:
    """Keeps the columns of the rest that keep_ef marks (host arrays).

    Raises:
      UserError: shapes that do not belong together.
    """
    left, right, rest = (np.asarray(a) for a in (left_edr, right_erf, rest_edf))
    keep = np.asarray(keep_ef, bool)
    experts, d, f = rest.shape
    dtype = rest.dtype if dtype is None else dtype
    width = max(int(keep.sum(1).max()), 1)
    kept = np.zeros((experts, d, width), dtype)
    index = np.full((experts, width), f, np.int32)
    for e in range(experts):
      own = np.flatnonzero(keep[e])
      index[e, : len(own)] = own
      kept[e, :, : len(own)] = rest[e][:, own]
    node = cls(left=left.astype(dtype), right=right.astype(dtype), kept=kept, index=index)
    node.validate()
    return node

  @classmethod
  def concat(cls, nodes: Sequence['LowRankSparse']) -> Self:
    """The experts of several nodes of one rank, kept columns as arrays."""
    f = nodes[0].shape[2]
    width = max(n.index.shape[1] for n in nodes)
    stack = lambda name: np.concatenate([np.asarray(getattr(n, name)) for n in nodes])
    pad = lambda a, axis, value: np.pad(
        np.asarray(a), [(0, width - a.shape[axis]) if i == axis else (0, 0)
                        for i in range(a.ndim)], constant_values=value,
    )
    return cls(
        left=stack('left'), right=stack('right'),
        kept=np.concatenate([pad(n.kept, 2, 0) for n in nodes]),
        index=np.concatenate([pad(n.index, 1, f) for n in nodes]),
    )

  def take(self, experts: Sequence[int] | np.ndarray, shards: int = 1) -> Self:
    """The node of these experts, in this order (host arrays)."""
    ids = np.asarray(experts)
    kept = self.kept
    node: Any = kept if isinstance(kept, base.WeightNode) else None
    own = np.asarray(kept)[ids] if node is None else node.take(ids, shards)
    pick = lambda a: np.asarray(a)[ids]
    return dataclasses.replace(
        self, left=pick(self.left), right=pick(self.right), kept=own, index=pick(self.index)
    )

  def sharded(self, shards: int) -> Self:
    if not isinstance(self.kept, base.WeightNode):
      return self
    return dataclasses.replace(self, kept=self.kept.sharded(shards))

  def specs(self, mesh: Mesh | None = None) -> Self:
    own = super().specs(mesh)
    if isinstance(self.kept, base.WeightNode):
      return dataclasses.replace(own, kept=self.kept.specs(mesh))
    return own

  def to_arrays(self) -> dict[str, np.ndarray]:
    arrays = {name: np.asarray(getattr(self, name)) for name in ('left', 'right', 'index')}
    if not isinstance(self.kept, base.WeightNode):
      return {**arrays, f'kept.{_ARRAY}': np.asarray(self.kept)}
    return arrays | {f'kept.{name}': a for name, a in self.kept.to_arrays().items()}

  def static(self) -> dict[str, Any]:
    if not isinstance(self.kept, base.WeightNode):
      return {'kept': {'class': _ARRAY, 'static': {}}}
    return {'kept': {'class': type(self.kept).__name__, 'static': self.kept.static()}}

  @classmethod
  def from_arrays(cls, static: Mapping[str, Any], arrays: Mapping[str, Any]) -> Self:
    own = {k.removeprefix('kept.'): a for k, a in arrays.items() if k.startswith('kept.')}
    rest = {k: a for k, a in arrays.items() if not k.startswith('kept.')}
    base.require(
        set(rest) == {'left', 'right', 'index'} and 'kept' in static,
        f'LowRankSparse: arrays {sorted(arrays)} found, left, right, index and kept needed; '
        'restore the folder',
    )
    name = static['kept']['class']
    if name == _ARRAY:
      base.require(set(own) == {_ARRAY}, f'LowRankSparse.kept: arrays {sorted(own)} found')
      kept = own[_ARRAY]
    else:
      base.require(name in KEPT_CLASSES, f'LowRankSparse.kept has the unknown class {name!r}')
      kept = KEPT_CLASSES[name].from_arrays(static['kept']['static'], own)
    node = cls(kept=kept, **rest)
    node.validate()
    return node

  def validate(self) -> None:
    base.require_array(self, 'left', base.LEVEL_DTYPES, (None, None, None))
    e, d, r = self.left.shape
    base.require_array(self, 'right', base.LEVEL_DTYPES, (e, r, None))
    base.require_array(self, 'index', (np.int32,), (e, None))
    wanted = (e, d, self.index.shape[1])
    base.require(
        tuple(self.kept.shape) == wanted,
        f'LowRankSparse.kept has shape {tuple(self.kept.shape)}, must be {wanted}',
    )
    if base.is_concrete(self.index):
      index, f = np.asarray(self.index), self.right.shape[2]
      base.require(
          bool((index >= 0).all() and (index <= f).all()),
          f'LowRankSparse.index names outputs from {index.min()} to {index.max()}, the weight has '
          f'{f}',
      )

  def kept_rows(self, i: jax.Array | int, dtype: Any) -> jax.Array:
    """The kept part of the rest of one expert, [s, d]."""
    if isinstance(self.kept, base.WeightNode):
      return self.kept.expert_rows(i, dtype)
    kept = jax.lax.dynamic_index_in_dim(jnp.asarray(self.kept), i, 0, keepdims=False)
    return kept.astype(dtype).T

  def factors(self, i: jax.Array | int, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """left [d, r], right [r, f] and index [s] of one expert; i may be traced."""
    pick = lambda a: jax.lax.dynamic_index_in_dim(jnp.asarray(a), i, 0, keepdims=False)
    return pick(self.left).astype(dtype), pick(self.right).astype(dtype), pick(self.index)

  def expert_rows(self, i: jax.Array | int, dtype: Any) -> jax.Array:
    left, right, index = self.factors(i, jnp.float32)
    rows_fd = jnp.matmul(right.T, left.T, precision=jax.lax.Precision.HIGHEST)
    kept = self.kept_rows(i, jnp.float32)
    return rows_fd.at[index].add(kept, mode='drop', unique_indices=False).astype(dtype)
