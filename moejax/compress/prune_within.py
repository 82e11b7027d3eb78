"""Parts of experts dropped: hidden units, or n weights kept of every m (MoE-Pruner, 2410.12013).

What a token gives a weight counts by its gate: a unit is worth |its row of wo| * |gate * unit| over
the expert's tokens, a weight |w| * |gate * input|. Both are looked up layer by layer, behind what
is pruned already.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import math
import re
from typing import Any

import jax
import numpy as np

from moejax.compress import align_core, base, fewer, on_inputs, parts, prune_core
from moejax.config import ModelConfig
from moejax.config.moe import require_pattern
from moejax.errors import UserError

_UNITS = ('wi', 'gate', 'wi_bias', 'gate_bias')


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Within(base.Transform):
  """An expert at a time, from its tokens and their gates."""

  expert_group: int

  def __post_init__(self):
    if self.expert_group < 1:
      raise UserError(f'{self.name}: expert_group = {self.expert_group}: at least 1')

  def calibration(self) -> base.Calibration:
    return base.Calibration(mask_special=False)

  def accepts(self, path: str, leaf: Any) -> None:
    base.require_array(path, leaf, self.name)

  def layer(
      self, plan: Mapping[str, Any], path: str, source: base.LeafSource,
      context: base.LayerContext,
  ) -> Iterator[parts.Group]:
    del plan
    for start in range(0, context.num_experts, self.expert_group):
      ids = tuple(range(start, min(start + self.expert_group, context.num_experts)))
      yield context.group(ids, functools.partial(self._group, path, source, context, ids))

  def _group(self, path, source, context, ids) -> parts.Group:
    made: dict[str, list[np.ndarray]] = {}
    rows = []
    for e in ids:
      expert = {n: w[0] for n, w in fewer.read_experts(source, path, [e]).items()}
      (x,), (gate,) = context.inputs([e]), context.gates([e])
      new, about = self._pruned(expert, x, gate, context)
      for name, w in new.items():
        made.setdefault(name, []).append(w.astype(expert[name].dtype))
      rows.append({
          'path': f'{path}/experts', 'expert': e, 'transform': self.name,
          'bits_per_weight': fewer.bits_of(new), **about,
          **on_inputs.change({n: w[None] for n, w in expert.items()}, new, [x],
                             context.act),
      })
    return fewer.group_of(ids, {n: np.stack(ws) for n, ws in made.items()}, rows, {})

  def _pruned(self, expert, x_md, gate_m, context) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    raise NotImplementedError


def _square_sums(expert, x_md, gate_m, activation) -> dict[str, np.ndarray]:
  """Of each input of each matrix, the sum of squares of gate * input; ones without a token."""
  d, f = expert['wi'].shape
  if not len(x_md):
    return {'wi': np.ones(d), 'gate': np.ones(d), 'wo': np.ones(f)}
  hidden = align_core.hidden_units(expert, x_md, activation)
  total = lambda a: np.square(a * gate_m[:, None], dtype=np.float64).sum(0)
  inputs = total(x_md)
  return {'wi': inputs, 'gate': inputs, 'wo': total(hidden)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneUnits(_Within):
  """Hidden units dropped; make one with `prune_units`. Without units, ratio: which share goes."""

  units: int | None
  ratio: float | None

  def __post_init__(self):
    super().__post_init__()
    if self.ratio is not None and not 0 <= self.ratio < 1:
      raise UserError(f'prune_units: ratio = {self.ratio}: the share that goes, in [0, 1)')

  @property
  def name(self) -> str:
    return 'prune_units'

  @property
  def takes_split(self) -> bool:
    return False

  def _count(self, config: ModelConfig) -> int:
    moe: Any = config.moe
    width = moe.width(config.d_ff)
    count = width - math.floor(width * (self.ratio or 0) + 1e-9)
    count = count if self.units is None else self.units
    if not 1 <= count <= width:
      raise UserError(f'prune_units: {count} units of {width}: between 1 and {width}')
    return count

  def plan(self, config: ModelConfig, source: Any, statistics: Any) -> Mapping[str, Any]:
    return self.foreseen(config)

  def foreseen(self, config: ModelConfig) -> Mapping[str, Any]:
    return dict.fromkeys(fewer.experts_held(config), self._count(config))

  def reconfigure(self, config: ModelConfig, plan: Mapping[str, Any]) -> ModelConfig:
    moe: Any = config.moe
    return dataclasses.replace(
        config, moe=dataclasses.replace(moe, d_ff=next(iter(plan.values())))
    )

  def _pruned(self, expert, x_md, gate_m, context):
    sums = _square_sums(expert, x_md, gate_m, context.act)
    score = prune_core.unit_score(expert['wo'], sums['wo'])
    # Of units that no token woke those with the larger weights stay.
    size = np.linalg.norm(expert['wo'].astype(np.float32), axis=1)
    kept = np.sort(np.lexsort((-size, -np.asarray(score)))[: self._count(context.config)])
    new = dict(expert)
    new |= {name: expert[name][..., kept] for name in _UNITS if name in expert}
    return {**new, 'wo': expert['wo'][kept]}, {'units': len(kept)}

  def predict_layer(
      self, config: ModelConfig, path: str, leaves: Mapping[str, Any], zero_share: Any
  ) -> dict[str, Any]:
    count = self._count(config)

    def shape(name, leaf):
      name = name.removeprefix('experts/')
      if name in _UNITS:
        return (*leaf.shape[:-1], count)
      return (leaf.shape[0], count, leaf.shape[2]) if name == 'wo' else leaf.shape

    return {
        name: jax.ShapeDtypeStruct(shape(name, leaf), leaf.dtype)
        if name.startswith('experts/') else leaf for name, leaf in leaves.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneWeights(_Within):
  """n weights of every m kept; make one with `prune_weights`."""

  n: int
  m: int
  layers: str

  def __post_init__(self):
    super().__post_init__()
    require_pattern(self.layers)
    if not 1 <= self.n <= self.m:
      raise UserError(f'prune_weights: n = {self.n} of m = {self.m}: 1 <= n <= m')

  @property
  def name(self) -> str:
    return 'prune_weights'

  def takes(self, path: str) -> bool:
    return re.fullmatch(self.layers, path) is not None

  def accepts(self, path: str, leaf: Any) -> None:
    super().accepts(path, leaf)
    if len(leaf.shape) == 3 and leaf.shape[1] % self.m:
      raise UserError(
          f'prune_weights: {path} has {leaf.shape[1]} inputs: m = {self.m} does not divide them'
      )

  def _pruned(self, expert, x_md, gate_m, context):
    sums = _square_sums(expert, x_md, gate_m, context.act)
    new = dict(expert)
    for name in sums.keys() & expert.keys():
      new[name] = np.asarray(prune_core.n_of_m(expert[name], sums[name], self.n, self.m))
    matrices = [new[name] for name in sums.keys() & expert.keys()]
    zeros = sum(w.size - np.count_nonzero(w) for w in matrices)
    return new, {'zeros': zeros / sum(w.size for w in matrices)}

  def predict(self, path: str, leaf: Any, zero_share: float | None) -> Any:
    return leaf


def prune_units(
    units: int | None = None, *, ratio: float | None = None, expert_group: int = 8
) -> PruneUnits:
  """Every expert keeps its most important hidden units; experts become narrower, `moe.d_ff`.

  Args:
    units: how many stay in an expert, in all layers alike. ratio: the share that goes instead,
      floor(ratio * d_ff) units.
    expert_group: experts in memory at a time; the unit of resume.

  Raises:
    UserError: numbers that no expert can have.
  """
  if (units is None) == (ratio is None):
    raise UserError('prune_units: give one of units and ratio')
  return PruneUnits(units=units, ratio=ratio, expert_group=expert_group)


def prune_weights(
    n: int = 2, m: int = 4, *, layers: str = '.*', expert_group: int = 8
) -> PruneWeights:
  """Of every m inputs of an expert's output the n weights with most |w| * |gate * input| stay.

  The others are 0; they are stored as the weights are, so a file shrinks only behind another step
  or where it is packed (`account.nonzeros` counts what is left).

  Args:
    n, m: 2, 4 is what sparse tensor cores take.
    layers: a regex of FFN paths; others stay as they are.
    expert_group: experts in memory at a time; the unit of resume.

  Raises:
    UserError: numbers that do not fit, or matrices whose inputs m does not divide.
  """
  return PruneWeights(n=n, m=m, layers=layers, expert_group=expert_group)
