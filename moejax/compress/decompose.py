"""decompose(...): experts as a low rank and a few outputs of the rest (MC-SMoE, LoSparse).

The zero-shot form (arXiv 2310.01334, A9): sensitivities come from gradients on the calibration,
nothing is trained. One threshold over all weights decides which outputs of which matrix keep their
rest.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np

from moejax import account, weights
from moejax.compress import base, fewer, parts, stats
from moejax.config import ModelConfig
from moejax.config.moe import require_known, require_pattern
from moejax.errors import UserError
from moejax.weights import lowrank_core

SENSITIVITIES = ('gradients', 'magnitude')
_MATRICES = ('gate', 'wi', 'wo')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decompose(base.Transform):
  """W = left right + kept columns of the rest; make one with `decompose`."""

  rank: int | None
  ratio: float | None
  energy: float | None
  keep: float
  sensitivity: str
  layers: str
  expert_group: int
  dtype: str

  def __post_init__(self):
    given = [float(v) for v in (self.rank, self.ratio, self.energy) if v is not None]
    if len(given) != 1 or given[0] <= 0:
      raise UserError('decompose: give one of rank, ratio and energy, above 0')
    if not 0 <= self.keep <= 1:
      raise UserError(f'keep = {self.keep}: the share of the rest that stays, in [0, 1]')
    require_known(self.sensitivity, 'sensitivity', SENSITIVITIES)
    require_known(self.dtype, 'dtype', ('weights', 'bfloat16', 'float32'))
    if self.expert_group < 1:
      raise UserError(f'expert_group = {self.expert_group}: at least 1')
    require_pattern(self.layers)

  def takes(self, path: str) -> bool:
    return re.fullmatch(self.layers, path) is not None

  def accepts(self, path: str, leaf: Any) -> None:
    base.require_array(path, leaf, self.name, 'decompose first, then quantize')

  def statistics(self) -> tuple[str, ...]:
    return ('gradients',) if self.sensitivity == 'gradients' and 0 < self.keep < 1 else ()

  def plan(
      self, config: ModelConfig, source: base.LeafSource, statistics: stats.Statistics | None
  ) -> Mapping[str, Any]:
    """{layer: {weight: {'rank', 'kept': one hexadecimal bit mask of outputs an expert}}}."""
    scores: dict[tuple[str, str], np.ndarray] = {}
    ranks: dict[tuple[str, str], int] = {}
    for path, experts in fewer.experts_held(config).items():
      if not self.takes(path):
        continue
      sums = {} if statistics is None else statistics.of(path)
      for name in self._names(source, path):
        rank = ranks[path, name] = self._rank(source, path, name, experts)
        scores[path, name] = np.stack([
            self._score(source, path, name, e, rank, sums) for e in range(experts)
        ])
    kept = self._kept(scores, source)
    out: dict[str, Any] = {}
    for (path, name), mask in kept.items():
      out.setdefault(path, {})[name] = {
          'rank': ranks[path, name], 'kept': [np.packbits(m).tobytes().hex() for m in mask],
      }
    return out

  def _names(self, source, path) -> list[str]:
    return [n for n in _MATRICES if f'{path}/experts/{n}' in source.paths()]

  def _rank(self, source, path, name, experts) -> int:
    if self.rank is not None:
      return self.rank
    d, f = source.abstract(f'{path}/experts/{name}').shape[1:]
    if self.ratio is not None:
      return lowrank_core.rank_of_ratio((d, f), self.ratio)
    assert self.energy is not None
    return max(
        lowrank_core.rank_of_energy(source.read_expert(f'{path}/experts/{name}', e), self.energy)
        for e in range(experts)
    )

  def _score(self, source, path, name, e, rank, sums) -> np.ndarray:
    """Of each output, the mean over its inputs of |rest * gradient| or of |rest|, float64 [f]."""
    rest = np.asarray(_split(source.read_expert(f'{path}/experts/{name}', e), rank)[2])
    size = np.abs(rest.astype(np.float64))
    if f'square/{name}' in sums:
      size = size * np.sqrt(sums[f'square/{name}'][e])
    return size.mean(0)

  def _kept(self, scores, source) -> dict[tuple[str, str], np.ndarray]:
    """Outputs above the k-th smallest score of all weights, each counting for its inputs."""
    if self.keep in (0, 1):
      return {key: np.full(s.shape, bool(self.keep)) for key, s in scores.items()}
    inputs = {
        (path, name): source.abstract(f'{path}/experts/{name}').shape[1] for path, name in scores
    }
    flat = np.concatenate([s.ravel() for s in scores.values()])
    weight = np.concatenate([np.full(s.size, inputs[key]) for key, s in scores.items()])
    order = np.argsort(flat, kind='stable')
    falls = int(np.floor(weight.sum() * (1 - self.keep)))
    place = np.searchsorted(np.cumsum(weight[order]), falls)
    threshold = flat[order][min(int(place), len(flat) - 1)] if falls else -np.inf
    return {key: s >= threshold for key, s in scores.items()}

  def layer(
      self, plan: Mapping[str, Any], path: str, source: base.LeafSource,
      context: base.LayerContext,
  ) -> Iterator[parts.Group]:
    own = plan[path]
    for start in range(0, context.num_experts, self.expert_group):
      ids = tuple(range(start, min(start + self.expert_group, context.num_experts)))
      yield context.group(ids, functools.partial(self._group, own, path, source, ids))

  def _group(self, own, path, source, ids) -> parts.Group:
    made: dict[str, list[parts.Part]] = {}
    rows = []
    for name in fewer.expert_names(source, path):
      whole = np.stack([source.read_expert(f'{path}/experts/{name}', e) for e in ids])
      if name not in own:
        made[name] = [parts.Part(format='array', experts=ids, weight=whole)]
        continue
      left, right, rest = (np.asarray(a) for a in _split(whole, own[name]['rank']))
      keep = np.stack([_mask(own[name]['kept'][e], rest.shape[2]) for e in ids])
      node = weights.LowRankSparse.from_dense(
          left, right, rest, keep, whole.dtype if self.dtype == 'weights' else self.dtype
      )
      made[name] = [parts.Part(format='low_rank_sparse', experts=ids, weight=node)]
      for i, e in enumerate(ids):
        size = float(np.linalg.norm(whole[i].astype(np.float64)))
        lost = float(np.linalg.norm(np.where(keep[i][None], 0.0, rest[i].astype(np.float64))))
        one = node.take([i])
        rows.append({
            'path': f'{path}/experts/{name}', 'expert': e, 'transform': self.name,
            'rank': own[name]['rank'], 'kept': int(keep[i].sum()), 'outputs': rest.shape[2],
            'relative_weight_error': lost / max(size, 1e-30),
            'bits_per_weight': one.bits() / one.size,
        })
    return parts.Group(experts=ids, parts=made, rows=rows)

  def predict(self, path: str, leaf: Any, zero_share: float | None) -> Any:
    if path.rpartition('/')[2] not in _MATRICES:
      return leaf
    if self.energy is not None:
      raise UserError('decompose: the rank of an energy is not known before the weights are read')
    rank = self.rank or lowrank_core.rank_of_ratio(leaf.shape[1:], self.ratio or 0.0)
    dtype = leaf.dtype if self.dtype == 'weights' else self.dtype
    return account.low_rank_sparse_node(leaf.shape, rank, self.keep, np.dtype(dtype))


def _split(w: np.ndarray, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  return lowrank_core.split(w, rank)


def _mask(text: str, outputs: int) -> np.ndarray:
  return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:outputs].astype(bool)


def decompose(
    rank: int | None = None, *, ratio: float | None = None, energy: float | None = None,
    keep: float = 0.1, zero_shot: bool = True, sensitivity: str = 'gradients',
    layers: str = '.*', expert_group: int = 8, dtype: str = 'weights',
) -> Decompose:
  """Every expert matrix as left right, plus the outputs of the rest that matter most.

  Args:
    rank: of left right, 32 where nothing is said; or ratio: its weights over the matrix's; or
      energy: the share of the squared singular values that it holds, in each layer the largest
      rank any expert needs.
    keep: the share of the rest's weights that stays, under one threshold over the whole model, so
      that matrices keep different numbers of outputs; 0 for a low rank alone.
    zero_shot: nothing is trained. For the trained form see `train.low_rank` and
      configs/recover.py:losparse.
    sensitivity: 'gradients', |rest * root mean square gradient| on the calibration, for which the
      model is in memory whole; 'magnitude', |rest|.
    layers: a regex of FFN paths; others stay as they are.
    expert_group: experts in memory at a time; the unit of resume.
    dtype: of all parts: 'weights' for the matrix's own, 'bfloat16' or 'float32'.

  Raises:
    UserError: settings that do not fit.
  """
  if not zero_shot:
    raise UserError(
        'decompose: zero_shot = False needs training, which no chain does: train with '
        'configs/recover.py:losparse@FOLDER'
    )
  if rank is None and ratio is None and energy is None:
    rank = 32
  return Decompose(
      rank=rank, ratio=ratio, energy=energy, keep=keep, sensitivity=sensitivity, layers=layers,
      expert_group=expert_group, dtype=dtype,
  )
