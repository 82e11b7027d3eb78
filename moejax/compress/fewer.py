"""What merging and pruning share: how many experts each layer is left with."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np

from moejax import tree
from moejax.compress import base, parts
from moejax.config import ModelConfig
from moejax.config.moe import require_known, require_pattern
from moejax.errors import UserError

BUDGETS = ('uniform', 'global')
# The leaves with an entry for each of a router's choices.
ROUTER = ('router/kernel', 'router/bias')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fewer(base.Transform):
  """A transform after which the layers that match `layers` hold fewer experts.

  layer_experts: how many in each of these layers, in the model's order; without, experts: how many
  a layer, on average with a global budget; without, ratio: which share of them goes.
  """

  experts: float | None
  ratio: float | None
  layer_experts: tuple[int, ...]
  budget: str
  at_least: int
  at_most: int | None
  layers: str
  expert_group: int
  seed: int

  def __post_init__(self):
    require_known(self.budget, 'budget', BUDGETS)
    if self.experts is None and self.ratio is None and not self.layer_experts:
      raise UserError(f'{self.name}: experts, ratio or layer_experts must say how many stay')
    if self.ratio is not None and not 0 <= self.ratio < 1:
      raise UserError(f'{self.name}: ratio = {self.ratio}: the share that goes, in [0, 1)')
    if self.at_least < 1 or (self.at_most is not None and self.at_most < self.at_least):
      raise UserError(
          f'{self.name}: at_least = {self.at_least}, at_most = {self.at_most}: 1 <= at_least <= '
          'at_most'
      )
    if self.expert_group < 1:
      raise UserError(f'{self.name}: expert_group = {self.expert_group}: at least 1')
    require_pattern(self.layers)

  @property
  def takes_split(self) -> bool:
    return False

  def takes(self, path: str) -> bool:
    return re.fullmatch(self.layers, path) is not None

  def chosen(self, config: ModelConfig) -> dict[str, int]:
    """The layers to change, and how many experts each holds."""
    held = experts_held(config)
    found = {path: n for path, n in held.items() if re.fullmatch(self.layers, path)}
    if not found:
      raise UserError(
          f'layers = {self.layers!r} matches none of the sparse layers {", ".join(held)}'
      )
    return found

  def average(self, held: Mapping[str, int]) -> float:
    """Experts a layer, for a global budget."""
    if self.experts is not None:
      return self.experts
    counts = self.uniform_counts(held)
    return sum(counts.values()) / len(counts)

  def uniform_counts(self, held: Mapping[str, int]) -> dict[str, int]:
    """How many experts each layer is left with, where no statistics decide it.

    Raises:
      UserError: more than a layer has, a broken number, or a list of another length.
    """
    if self.layer_experts:
      if len(self.layer_experts) != len(held):
        raise UserError(
            f'{self.name}: layer_experts has {len(self.layer_experts)} numbers for the '
            f'{len(held)} layers {", ".join(held)}'
        )
      counts = dict(zip(held, self.layer_experts))
    elif self.experts is None:
      ratio = self.ratio or 0.0
      counts = {path: n - math.floor(n * ratio + 1e-9) for path, n in held.items()}
    else:
      if self.experts != int(self.experts):
        raise UserError(
            f"{self.name}: experts = {self.experts}: a whole number with budget = 'uniform'"
        )
      counts = dict.fromkeys(held, int(self.experts))
    for path, count in counts.items():
      if not 1 <= count <= held[path]:
        raise UserError(
            f'{self.name}: {count} experts for {path}, which has {held[path]}: between 1 and '
            f'{held[path]}'
        )
    return counts

  def accepts(self, path: str, leaf: Any) -> None:
    base.require_array(path, leaf, self.name)

  def counts(self, plan: Mapping[str, Any]) -> dict[str, int]:
    """How many experts the layers of a plan are left with."""
    return {path: own['count'] for path, own in plan.items()}

  def foreseen(self, config: ModelConfig) -> dict[str, Any]:
    """A plan's counts from shapes alone; with a global budget every layer gets the average."""
    held = self.chosen(config)
    if self.budget == 'uniform' or self.layer_experts:
      counts = self.uniform_counts(held)
    else:
      counts = dict.fromkeys(held, round(self.average(held)))
    return {path: {'count': count} for path, count in counts.items()}

  def predict_layer(
      self, config: ModelConfig, path: str, leaves: Mapping[str, Any], zero_share: Any
  ) -> dict[str, Any]:
    del zero_share
    own = self.foreseen(config).get(path)
    if own is None:
      return dict(leaves)
    return {
        name: jax.ShapeDtypeStruct((own['count'], *leaf.shape[1:]), leaf.dtype)
        if name.startswith('experts/') else leaf for name, leaf in leaves.items()
    }


def how_many(
    name: str, experts: float | Sequence[int] | None, ratio: float | None
) -> dict[str, Any]:
  """The fields of `Fewer` from what a factory takes: a number, one for each layer, or a share."""
  if (experts is None) == (ratio is None):
    raise UserError(f'{name}: give one of experts and ratio')
  if isinstance(experts, (tuple, list)):
    return {'experts': None, 'ratio': None, 'layer_experts': tuple(experts)}
  return {'experts': experts, 'ratio': ratio, 'layer_experts': ()}


def check_router(config: ModelConfig, name: str, by_number: bool) -> None:
  """Raises UserError for a router whose choices cannot be changed.

  by_number: whether the router's choices stay as many, as router 'hash' needs them.
  """
  moe: Any = config.moe
  if moe.merged:
    raise UserError(
        f'{name}: moe.merged = True: the experts are merged already; start from the model before'
    )
  if moe.router == 'hash' and not by_number:
    raise UserError(
        f"{name}: router 'hash' sends tokens to experts by number: none can go; only a merge with "
        "router = 'remap' leaves it as it is"
    )


def experts_held(config: ModelConfig) -> dict[str, int]:
  """Every sparse layer's path, in the model's order, and how many experts it holds."""
  if config.moe is None:
    raise UserError(f'the model has no experts ({config.family})')
  return {
      path: config.of_layer(stack, i).moe.held  # type: ignore[union-attr]
      for stack in config.stacks for i in config.sparse_layers(stack)
      for path in [f'{stack}/layers_{i}/ffn']
  }


def leave(
    config: ModelConfig, counts: Mapping[str, int], merged: bool, sum_groups: bool = False
) -> ModelConfig:
  """The configuration of a model whose layers are left with `counts` experts.

  merged: the router keeps its choices. Otherwise an expert_capacity grows as the experts of the
  smallest layer become fewer, so that a sequence still fits, and equal counts are num_experts.
  """
  moe: Any = config.moe
  now = list({**experts_held(config), **counts}.values())
  if merged:
    changes: dict[str, Any] = {
        'layer_experts': tuple(now), 'merged': True, 'sum_groups': sum_groups
    }
  elif len(set(now)) == 1:
    changes = {'num_experts': now[0], 'layer_experts': ()}
  else:
    changes = {'num_experts': max(now), 'layer_experts': tuple(now)}
  if not merged and moe.expert_capacity is not None:
    before = min(experts_held(config).values())
    changes['expert_capacity'] = -(-moe.expert_capacity * before // min(now))
  return dataclasses.replace(config, moe=dataclasses.replace(moe, **changes))


def check_top_k(config: ModelConfig, counts: Mapping[str, int], name: str) -> None:
  """Raises UserError where a token could not meet as many experts as it does."""
  moe: Any = config.moe
  for path, count in counts.items():
    if count < moe.top_k:
      raise UserError(
          f'{name}: {count} experts for {path}, but each token meets top_k = {moe.top_k}: leave at '
          'least as many'
      )


def layer_leaves(source: base.LeafSource, path: str, names: Sequence[str]) -> dict[str, np.ndarray]:
  """Leaves of an FFN by their names, those that it has."""
  there = set(source.paths())
  return {n: np.asarray(source.read(f'{path}/{n}')) for n in names if f'{path}/{n}' in there}


def expert_names(source: base.LeafSource, path: str) -> list[str]:
  """Names of the expert weights of a layer, and of their biases ('wi', ...)."""
  return [leaf.rpartition('/')[2] for leaf in base.expert_leaves(source, path, biases=True)]


def read_experts(
    source: base.LeafSource, path: str, experts: Sequence[int]
) -> dict[str, np.ndarray]:
  """The weights of some experts of a layer, [e, ...] each, in this order."""
  return {
      name: np.stack([source.read_expert(f'{path}/experts/{name}', int(e)) for e in experts])
      for name in expert_names(source, path)
  }


def predicted_router(leaves: Mapping[str, Any], count: int | None) -> dict[str, Any]:
  """A layer's shapes with a router of `count` rows; None leaves it."""
  if count is None:
    return dict(leaves)
  return {
      name: jax.ShapeDtypeStruct((*leaf.shape[:-1], count), leaf.dtype)
      if name in ROUTER else leaf for name, leaf in leaves.items()
  }


def group_of(
    experts: Sequence[int], made: Mapping[str, np.ndarray], rows: Sequence[Mapping[str, Any]],
    leaves: Mapping[str, np.ndarray],
) -> parts.Group:
  """A group of plain arrays."""
  ids = tuple(int(e) for e in experts)
  return parts.Group(
      experts=ids, rows=rows, leaves=leaves,
      parts={name: [parts.Part(format='array', experts=ids, weight=np.asarray(w))]
             for name, w in made.items()},
  )


def bits_of(made: Mapping[str, Any]) -> float:
  """Stored bits a weight."""
  arrays = list(made.values())
  return sum(8.0 * a.nbytes for a in arrays) / tree.count(dict(enumerate(map(np.asarray, arrays))))
