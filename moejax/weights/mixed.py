"""Mixed: the experts of one weight in different formats, as a quality gate leaves them."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np

from moejax.weights import base
from moejax.weights.block_ternary import BlockTernary
from moejax.weights.packed import Packed
from moejax.weights.packed_ternary import PackedTernary
from moejax.weights.ternary import Ternary
from moejax.weights.ternary_v1 import TernaryV1

PART_CLASSES: dict[str, type[base.WeightNode]] = {
    c.__name__: c for c in (Ternary, TernaryV1, Packed, PackedTernary, BlockTernary)
}
_ARRAY = 'array'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed(base.WeightNode):
  """Experts spread over parts, each a weight node or an array [e_part, d, f].

  Attributes:
    parts: the weights by format. On a mesh they are split by expert once laid out by `sharded`;
      else every device holds them all.
    part: uint8 [e], the part that holds an expert.
    slot: uint16 [e], its place there, modulo the part's size: a device's piece of a node keeps
      the places of the whole.
    shards: into how many pieces the parts can be cut, each for its share of the experts.
  """

  parts: tuple[Any, ...]
  part: Any
  slot: Any
  shards: int = base.static_field(default=1)

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape [e, d, f]."""
    return (self.part.shape[0], *self.parts[0].shape[1:])

  @classmethod
  def from_parts(cls, parts: Sequence[Any], experts: Sequence[Sequence[int]]) -> Self:
    """Joins parts; experts[j] names the experts in parts[j], in its order.

    Raises:
      UserError: an expert is in no part or in two, or parts differ in [d, f].
    """
    e = sum(len(x) for x in experts)
    named = sorted(int(i) for x in experts for i in x)
    base.require(named == list(range(e)), f'parts hold experts {named}, each of 0..{e - 1} once')
    part, slot = np.zeros(e, np.uint8), np.zeros(e, np.uint16)
    for j, x in enumerate(experts):
      part[list(x)] = j
      slot[list(x)] = np.arange(len(x))
    node = cls(parts=tuple(parts), part=part, slot=slot)
    node.validate()
    return node

  def sharded(self, shards: int) -> Self:
    """The node with the parts in `shards` pieces of equal numbers of experts (host arrays).

    A piece that holds fewer experts of a part than another is filled up with copies, so a device
    holds of each part as many experts as the device with most of them.
    """
    if shards == self.shards:
      return self
    e = self.part.shape[0]
    base.require(e % shards == 0, f'{e} experts do not split into {shards} shards')
    part, slot = np.asarray(self.part), np.asarray(self.slot)
    new_slot, parts = slot.copy(), []
    for j, p in enumerate(self.parts):
      own = [i + np.flatnonzero(part[i : i + e // shards] == j) for i in range(0, e, e // shards)]
      count = max(len(x) for x in own)
      taken = []
      for i, x in enumerate(own):
        new_slot[x] = i * count + np.arange(len(x))
        filler = slot[x[0]] if len(x) else 0
        taken += [*slot[x], *[filler] * (count - len(x))]
      is_node = isinstance(p, base.WeightNode)
      parts.append(p.take(taken, shards) if is_node else np.asarray(p)[taken])
    return dataclasses.replace(self, parts=tuple(parts), slot=new_slot, shards=shards)

  def specs(self, mesh: Mesh | None = None) -> Self:
    ways = 1 if mesh is None else mesh.shape['expert']
    split = ways > 1 and self.part.shape[0] % ways == 0
    own = PartitionSpec('expert') if split else PartitionSpec()
    if split and self.shards % ways == 0:
      parts = [p.specs(mesh) if isinstance(p, base.WeightNode) else own for p in self.parts]
    else:
      parts = [jax.tree.map(lambda _: PartitionSpec(), p) for p in self.parts]
    return dataclasses.replace(self, parts=tuple(parts), part=own, slot=own)

  def to_arrays(self) -> dict[str, np.ndarray]:
    whole = self.sharded(1)
    arrays = {'part': np.asarray(whole.part), 'slot': np.asarray(whole.slot)}
    for j, p in enumerate(whole.parts):
      fields = p.to_arrays() if isinstance(p, base.WeightNode) else {_ARRAY: np.asarray(p)}
      arrays.update({f'{j}.{name}': array for name, array in fields.items()})
    return arrays

  def static(self) -> dict[str, Any]:
    """The classes and static fields of the parts; `shards` is not stored."""
    return {
        'parts': [
            {'class': type(p).__name__, 'static': p.static()}
            if isinstance(p, base.WeightNode) else {'class': _ARRAY, 'static': {}}
            for p in self.parts
        ]
    }

  @classmethod
  def from_arrays(cls, static: Mapping[str, Any], arrays: Mapping[str, Any]) -> Self:
    parts = []
    for j, entry in enumerate(static['parts']):
      prefix = f'{j}.'
      own = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
      name = entry['class']
      if name == _ARRAY:
        base.require(set(own) == {_ARRAY}, f'Mixed part {j}: arrays {sorted(own)} found')
        parts.append(own[_ARRAY])
        continue
      base.require(name in PART_CLASSES, f'Mixed part {j} has the unknown class {name!r}')
      parts.append(PART_CLASSES[name].from_arrays(entry['static'], own))
    base.require(
        'part' in arrays and 'slot' in arrays, f'Mixed: arrays {sorted(arrays)} lack part or slot'
    )
    node = cls(parts=tuple(parts), part=arrays['part'], slot=arrays['slot'])
    node.validate()
    return node

  def validate(self) -> None:
    base.require_array(self, 'part', (np.uint8,), (None,))
    base.require_array(self, 'slot', (np.uint16,), (self.part.shape[0],))
    shapes = {tuple(p.shape[1:]) for p in self.parts}
    base.require(
        len(shapes) == 1 and all(len(p.shape) == 3 for p in self.parts),
        f'Mixed parts have shapes {[tuple(p.shape) for p in self.parts]}; one [d, f] is needed',
    )
    counts = [p.shape[0] for p in self.parts]
    base.require(
        sum(counts) == self.part.shape[0],
        f'Mixed parts hold {counts} experts, the weight has {self.part.shape[0]}',
    )
    if not (base.is_concrete(self.part) and base.is_concrete(self.slot)):
      return
    for j, count in enumerate(counts):
      slots = np.sort(np.asarray(self.slot)[np.asarray(self.part) == j])
      base.require(
          np.array_equal(slots, np.arange(count)),
          f'Mixed.slot gives part {j} the places {slots.tolist()}, it has {count}',
      )

  def expert_rows(self, i: jax.Array | int, dtype: Any) -> jax.Array:
    part = jnp.asarray(self.part)[i].astype(jnp.int32)
    slot = jnp.asarray(self.slot)[i].astype(jnp.int32)

    def rows(p):
      count = p.shape[0]
      if isinstance(p, base.WeightNode):
        return lambda s: p.expert_rows(s % count, dtype)
      pick = lambda s: jax.lax.dynamic_index_in_dim(jnp.asarray(p), s, 0, keepdims=False)
      return lambda s: pick(s % count).astype(dtype).T

    return jax.lax.switch(part, [rows(p) for p in self.parts], slot)

  @property
  def single(self) -> bool:
    """Always stacked."""
    return False
