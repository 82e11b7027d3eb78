"""prune(...): experts dropped, and their rows of the router with them (REAP, NAEE and others)."""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.compress import base, fewer, parts, prune_core, stats
from moejax.config import ModelConfig
from moejax.config.moe import require_known
from moejax.errors import UserError
from moejax.ops import ffn
from moejax.routing import router

METHODS = (*prune_core.SCORES, 'aimer', 'naee', 'random', 'task_specific')
_KINDS = {
    **dict.fromkeys(prune_core.SCORES, ('routing', 'outputs')),
    'frequency': ('routing',), 'soft_frequency': ('routing',), 'task_specific': ('routing',),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(fewer.Fewer):
  """Whole experts dropped; make one with `prune`."""

  method: str
  samples: int
  beta: float

  def __post_init__(self):
    super().__post_init__()
    require_known(self.method, 'method', METHODS)
    if self.method == 'naee' and self.budget == 'global':
      raise UserError("method 'naee' searches layer by layer: budget = 'uniform' or layer_experts")
    if self.method == 'task_specific' and self.budget == 'global':
      raise UserError("method 'task_specific' has its own budget: experts is the least it leaves")
    if self.samples < 1 or self.beta < 0:
      raise UserError(f'samples = {self.samples}: at least 1; beta = {self.beta}: at least 0')

  @property
  def sees_logits(self) -> bool:
    return self.method == 'naee'

  def statistics(self) -> tuple[str, ...]:
    return _KINDS.get(self.method, ())

  def plan(
      self, config: ModelConfig, source: base.LeafSource, statistics: stats.Statistics | None
  ) -> Mapping[str, Any]:
    """What each layer keeps: {path: {'count', 'kept', 'scores'}}; NAEE only says how many."""
    fewer.check_router(config, self.name, by_number=False)
    held = self.chosen(config)
    if self.method == 'naee':
      counts = self.uniform_counts(held)
      fewer.check_top_k(config, counts, self.name)
      return {path: {'count': n} for path, n in counts.items()}
    scores = {path: self._scores(path, n, source, statistics, place)
              for place, (path, n) in enumerate(held.items())}
    kept = self._kept(config, held, scores)
    fewer.check_top_k(config, {path: len(k) for path, k in kept.items()}, self.name)
    return {
        path: {'count': len(k), 'kept': k.tolist(), 'scores': scores[path].tolist()}
        for path, k in kept.items()
    }

  def _scores(self, path, experts, source, statistics, place) -> np.ndarray:
    if self.method == 'random':
      return np.random.default_rng((self.seed, place)).random(experts)
    if self.method == 'aimer':
      one = lambda e: prune_core.aimer(fewer.read_experts(source, path, [e]))
      return np.concatenate([one(e) for e in range(experts)])
    sums = statistics.of(path)
    if self.method == 'task_specific':
      return np.asarray(sums['tokens'], np.float64)
    return prune_core.score(self.method, sums)

  def _kept(self, config, held, scores) -> dict[str, np.ndarray]:
    top_k = config.moe.top_k
    if self.method == 'task_specific':
      least = self.uniform_counts(held)
      return {
          path: np.flatnonzero(prune_core.task_specific(
              s, np.ones(len(s), bool), self.beta, max(least[path], top_k)
          )).astype(np.int32)
          for path, s in scores.items()
      }
    if self.budget == 'uniform' or self.layer_experts:
      counts = self.uniform_counts(held)
      return {path: prune_core.keep(s, counts[path]) for path, s in scores.items()}
    # Shares of a layer's scores need them positive; AIMER's are not, and less is better.
    shares = {path: s - s.min() if s.min() < 0 else s for path, s in scores.items()}
    return prune_core.keep_globally(
        shares, self.average(held), max(self.at_least, top_k), self.at_most
    )

  def reconfigure(self, config: ModelConfig, plan: Mapping[str, Any]) -> ModelConfig:
    return fewer.leave(config, self.counts(plan), merged=False)

  def layer(
      self, plan: Mapping[str, Any], path: str, source: base.LeafSource,
      context: base.LayerContext,
  ) -> Iterator[parts.Group]:
    own = plan[path]
    if self.method == 'naee':
      # Found once: later groups and a resumed run read it from the first.
      chosen = functools.cache(lambda: self._search(path, source, context, own['count']))
    else:
      chosen = lambda: (np.array(own['kept'], np.int32), {'scores': own['scores']})
    count = own['count']
    for start in range(0, count, self.expert_group):
      ids = tuple(range(start, min(start + self.expert_group, count)))
      yield context.group(ids, functools.partial(self._group, path, source, chosen, ids))

  def _search(self, path, source, context, count) -> tuple[np.ndarray, dict[str, Any]]:
    x, logits = context.sample(self.samples)
    outputs = np.stack([
        np.asarray(ffn.dense_ffn(_expert(source, path, e), x, context.act))
        for e in range(context.num_experts)
    ])
    gates = functools.partial(_gates, context.config.moe)
    kept, error = prune_core.best_subset(outputs, logits, count, context.config.moe.top_k, gates)
    full = np.einsum('me,emd->md', gates(logits), outputs)
    return kept, {'relative_output_error': error / max(float(np.linalg.norm(full)), 1e-30)}

  def _group(self, path, source, chosen, ids) -> parts.Group:
    kept, why = chosen()
    made = fewer.read_experts(source, path, kept[list(ids)])
    if ids[0]:
      return fewer.group_of(ids, made, [], {})
    beside = fewer.layer_leaves(source, path, fewer.ROUTER)
    leaves = {name: leaf[..., kept] for name, leaf in beside.items()}
    row = {
        'path': f'{path}/experts', 'transform': self.name, 'method': self.method,
        'kept': kept.tolist(), 'bits_per_weight': fewer.bits_of(made), **why,
        'dropped': sorted(set(range(beside['router/kernel'].shape[-1])) - set(kept.tolist())),
    }
    return fewer.group_of(ids, made, [row], leaves)

  def predict_layer(
      self, config: ModelConfig, path: str, leaves: Mapping[str, Any], zero_share: Any
  ) -> dict[str, Any]:
    out = super().predict_layer(config, path, leaves, zero_share)
    return fewer.predicted_router(out, self.foreseen(config).get(path, {}).get('count'))


def _gates(moe: Any, logits_me: np.ndarray) -> np.ndarray:
  """The gates of the model's own router over any of its experts, 0 elsewhere, [m, e]."""
  experts = logits_me.shape[1]
  own = dataclasses.replace(
      moe, num_experts=experts, layer_experts=(), skip=(), expert_capacity=None,
      capacity_factor=None,
  )
  return np.asarray(_routed_gates(own, jnp.asarray(logits_me, jnp.float32)), np.float64)


@functools.partial(jax.jit, static_argnames=('moe',))
def _routed_gates(moe, logits_me):
  routing = router.route(moe, logits_me[None])
  gate_mk = jnp.where(routing.keep_mk, routing.gate_mk, 0)
  chosen_mke = jax.nn.one_hot(routing.choice_mk, logits_me.shape[1])
  return (chosen_mke * gate_mk[..., None]).sum(1)


def _expert(source, path, expert) -> dict[str, jax.Array]:
  return {name: jnp.asarray(w[0], jnp.float32)
          for name, w in fewer.read_experts(source, path, [expert]).items()}


def prune(
    method: str = 'reap', *, experts: float | tuple[int, ...] | None = None,
    ratio: float | None = None, budget: str = 'uniform', at_least: int = 1,
    at_most: int | None = None, layers: str = '.*', samples: int = 1024,
    beta: float = 0.1, expert_group: int = 16, seed: int = 0,
) -> Prune:
  """Drops the experts that a layer can do without, and their rows of the router.

  Shared experts stay. A dropped expert never gets a token: the router chooses among those kept. A
  fixed moe.expert_capacity grows as the experts become fewer.

  Args:
    method: 'reap', mean of gate * |output| (arXiv 2510.13999); 'ean', 'man', 'msan', sum and means
      of |output|; 'frequency', 'soft_frequency'; 'aimer' (2603.18492), from weights alone; 'naee'
      (2402.14800), the subset that keeps the layer's output, searched behind the layers pruned
      already; 'task_specific' (2206.00277), those whose share of the tokens is over beta / e, and
      at least `experts`; 'random', the control.
    experts: how many stay in a layer, or for each layer in the model's order; with a global budget
      the average. ratio: the share that goes instead, floor(ratio * e) experts.
    budget: 'uniform', or 'global', one threshold on an expert's share of its layer's score.
    at_least, at_most: bounds of a layer with a global budget.
    layers: a regex of FFN paths ('decoder/.*'); others stay as they are.
    samples: tokens that 'naee' compares outputs on. (Its dynamic skipping is `skip_second`.)
    beta: of 'task_specific'.
    expert_group: experts in memory at a time; the unit of resume.
    seed: of 'random'.

  Raises:
    UserError: an unknown method, or numbers that no layer can have.
  """
  return Prune(
      method=method, **fewer.how_many('prune', experts, ratio), budget=budget, at_least=at_least,
      at_most=at_most, layers=layers, samples=samples, beta=beta, expert_group=expert_group,
      seed=seed,
  )
