"""merge(...): experts grouped, aligned and made one (M-SMoE, arXiv 2310.01334, and its successors).

The plan says how many groups each layer gets and who joins whom; the layer step reads one group's
experts at a time, puts their hidden units in one order and merges them.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
from typing import Any
import zlib

import jax
import numpy as np

from moejax.compress import (
  align_core,
  base,
  fewer,
  grouping_core,
  merge_core,
  on_inputs,
  parts,
  prune_core,
  similarity_core,
  stats,
  stats_core,
)
from moejax.config import ModelConfig
from moejax.config.moe import require_known
from moejax.errors import UserError

# Basis of similarity -> the statistics it takes.
SIMILARITIES: dict[str, tuple[str, ...]] = {
    'router-logits': ('routing',), 'router-weight': (), 'weight': (), 'random': (),
    'feature': ('inputs',), 'feature.abs': ('inputs',), 'weight-feature': ('inputs',),
    'router-weight-feature': ('inputs',), 'gradient': (), 'weight-gradient': (),
    'output': ('outputs',), 'ream': ('routing', 'outputs'), 'mse': (),
    'feature-correlation.lsa': (), 'feature-correlation.max': (),
}
# These compare experts on the layer's inputs, behind the layers that are merged already.
ON_INPUTS = ('mse', 'feature-correlation.lsa', 'feature-correlation.max')
# These can be measured again behind the layers that are merged already.
SEQUENTIAL = ('ream', 'output', 'router-logits')
GROUPINGS: dict[str, tuple[str, ...]] = {
    'msmoe': (), 'spectral': (), 'agglomerative': ('all_outputs',), 'anchored': ('outputs',),
    'random': (),
}
ALIGNMENTS = ('weights', 'activations', 'both', 'none')
OPERATORS: dict[str, tuple[str, ...]] = {
    'frequency': (), 'uniform': (), 'reap': ('outputs',), 'fisher': (),
    'least_squares': (), 'zipit': (), 'zipit-weights': (), 'dominant': (),
}
ROUTERS = ('remap', 'slice', 'sum', 'reinit')
ALONE = ('', 'group', 'all')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge(fewer.Fewer):
  """Groups of experts made one; make one with `merge`, `msmoe`, `uncurl`, `hc_smoe` or `ream`."""

  similarity: str
  grouping: str
  capacity: int | None
  dominant_alone: str
  alignment: str
  reference: str
  include_wo: bool
  operator: str
  router: str
  sequential: bool
  ridge: float
  gradients: str
  compat: str

  def __post_init__(self):
    super().__post_init__()
    require_known(self.similarity, 'similarity', tuple(SIMILARITIES))
    require_known(self.grouping, 'grouping', tuple(GROUPINGS))
    require_known(self.alignment, 'alignment', ALIGNMENTS)
    require_known(self.reference, 'reference', ('dominant', 'first'))
    require_known(self.operator, 'operator', tuple(OPERATORS))
    require_known(self.router, 'router', ROUTERS)
    require_known(self.dominant_alone, 'dominant_alone', ALONE)
    require_known(self.compat, 'compat', ('', 'mcsmoe'))
    if self.dominant_alone and (self._on_inputs or self.router == 'slice'):
      raise UserError(
          f"dominant_alone = {self.dominant_alone!r} goes with neither similarity "
          f"{ON_INPUTS} nor router = 'slice'"
      )
    wants = 'gradient' in self.similarity or self.operator == 'fisher'
    if wants and not self.gradients:
      raise UserError(
          f'{self.name}: similarity = {self.similarity!r}, operator = {self.operator!r}: gradients '
          'must name the file of `moejax.compress.gradients`'
      )
    if self.ridge <= 0:
      raise UserError(f'ridge = {self.ridge}: above 0')
    if self.sequential and (
        self.grouping not in ('anchored', 'msmoe') or self.similarity not in SEQUENTIAL
        or self.dominant_alone or self.compat
    ):
      raise UserError(
          "sequential = True is for grouping 'anchored' or 'msmoe' by similarity "
          f'{SEQUENTIAL}, without dominant_alone and compat'
      )

  @property
  def _on_inputs(self) -> bool:
    return self.similarity in ON_INPUTS and self.grouping not in ('agglomerative', 'random')

  @property
  def _maps(self) -> bool:
    return self.router in ('remap', 'sum')

  def takes(self, path: str) -> bool:
    # Behind a map every layer needs one.
    return True if self._maps else super().takes(path)

  def calibration(self) -> base.Calibration:
    cap = 0.0 if self.sequential else base.Calibration().token_cap_factor
    return base.Calibration(mask_special=False, token_cap_factor=cap)

  @property
  def sees_logits(self) -> bool:
    return self.sequential

  def statistics(self) -> tuple[str, ...]:
    if self.sequential:
      # A global budget shares out groups by usage; what else is wanted the layers measure.
      return () if self.layer_experts or self.budget == 'uniform' else ('routing',)
    wanted = {'routing', *GROUPINGS[self.grouping], *OPERATORS[self.operator]}
    if self.grouping in ('msmoe', 'spectral', 'anchored'):
      wanted |= set(SIMILARITIES[self.similarity])
    return tuple(sorted(wanted))

  def plan(
      self, config: ModelConfig, source: base.LeafSource, statistics: stats.Statistics | None
  ) -> Mapping[str, Any]:
    """{path: {'count', 'usage', 'saliency', 'labels', 'dominant'}} of the layers to merge.

    Labels come in the layer step instead where that is sequential or compares experts on inputs.
    """
    fewer.check_router(config, self.name, by_number=self.router == 'remap')
    held = self.chosen(config)
    if statistics is None:
      counts = self.uniform_counts(held)
      return self._checked(config, {path: {'count': n} for path, n in counts.items()})
    sums = {path: statistics.of(path) for path in held}
    usage = {path: stats_core.usage(s) for path, s in sums.items()}
    counts = self._counts(config, held, usage)
    out: dict[str, Any] = {}
    for place, (path, count) in enumerate(counts.items()):
      own: dict[str, Any] = {'count': count, 'usage': usage[path].tolist()}
      if not self.sequential and (self.operator == 'reap' or self.grouping == 'anchored'):
        own['saliency'] = prune_core.score('reap', sums[path]).tolist()
      if not self._on_inputs and not self.sequential:
        similarity = functools.partial(self._similarity, path, source, sums[path], place)
        groups = self._group_experts(own, count, similarity, sums[path], place)
        labels = groups.labels
        if self.dominant_alone:
          labels = grouping_core.beside_dominant(groups, self.dominant_alone == 'all')
          own['count'] = int(labels.max()) + 1
        own |= {'labels': labels.tolist(), 'dominant': groups.dominant.tolist()}
      out[path] = own
    return self._checked(config, out)

  def _checked(self, config, plan) -> Mapping[str, Any]:
    if not self._maps:
      fewer.check_top_k(config, self.counts(plan), self.name)
    return plan

  def _counts(self, config, held, usage) -> dict[str, int]:
    if self.layer_experts or self.budget == 'uniform':
      return self.uniform_counts(held)
    everywhere = {
        path: usage[path] if path in usage else np.ones(n)
        for path, n in fewer.experts_held(config).items()
    }
    at_least = self.at_least if self._maps else max(self.at_least, config.moe.top_k)
    counts = grouping_core.global_counts(
        everywhere, self.average(held), set(held), at_least, self.at_most
    )
    return {path: counts[path] for path in held}

  def _group_experts(self, own, count, similarity, sums, place) -> grouping_core.Groups:
    usage = np.array(own['usage'])
    if self.grouping == 'random':
      return grouping_core.random(usage, count, hash_seed(self.seed, place))
    if self.grouping == 'agglomerative':
      mean = sums['output_all'] / np.maximum(sums['tokens_all'], 1)[:, None]
      return grouping_core.agglomerative(mean, usage, count)
    if self.grouping == 'spectral':
      return grouping_core.spectral(similarity(), usage, count, self.seed)
    if self.grouping == 'anchored':
      return grouping_core.anchored(similarity(), np.array(own['saliency']), count, self.capacity)
    if self.compat and self.budget == 'uniform':
      return grouping_core.assign_as_published(similarity(), usage, count)
    return grouping_core.assign(similarity(), usage, count, self.capacity)

  def _similarity(self, path, source, sums, place) -> np.ndarray:
    """What needs no input of the layer, [e, e]."""
    name = self.similarity
    router = lambda: source.read(f'{path}/router/kernel')
    if name == 'router-logits':
      found: Any = similarity_core.from_gram(sums['gram'])
    elif name == 'router-weight':
      found = similarity_core.router_weight(router())
    elif name == 'router-weight-feature':
      # A token's square is in the sums of each expert it met.
      square = sums['input_square'].sum(0) / (sums['tokens'].sum() / _tokens(sums))
      found = similarity_core.router_weight_feature(router(), square)
    elif name in ('feature', 'feature.abs'):
      found = similarity_core.from_vectors(
          stats_core.mean(sums, 'input' if name == 'feature' else 'input_abs')
      )
    elif name == 'random':
      found = np.random.default_rng(hash_seed(self.seed, place)).random(2 * (len(sums['tokens']),))
    elif name == 'output':
      found = similarity_core.from_vectors(stats_core.mean(sums, 'output'))
    elif name == 'ream':
      outputs = similarity_core.from_vectors(stats_core.mean(sums, 'output'))
      found = (outputs + similarity_core.from_gram(sums['gram'])) / 2
    else:
      found = self._of_weights(path, source, sums)
    return np.asarray(found)

  def _of_weights(self, path, source, sums) -> Any:
    """Bases on the weights themselves; two blocks of experts are in memory."""
    name, experts = self.similarity, len(sums['tokens'])
    gradients = {} if 'gradient' not in name else stats.read_gradients(
        self.gradients, path, source, 'gradient'
    )

    def vectors(ids: Sequence[int]) -> dict[str, np.ndarray]:
      if name == 'gradient':
        return {n: a[list(ids)] for n, a in gradients.items()}
      w = fewer.read_experts(source, path, ids)
      if name == 'weight-gradient':
        return {n: a * gradients[n][list(ids)] for n, a in w.items()}
      if name == 'weight-feature':
        scale = np.sqrt(sums['input_square'][list(ids)])[..., None]
        return {n: a * scale for n, a in w.items() if n in ('wi', 'gate')}
      return w

    gram = similarity_core.gram_in_blocks(vectors, experts, self.expert_group)
    return similarity_core.from_gram(gram)

  def reconfigure(self, config: ModelConfig, plan: Mapping[str, Any]) -> ModelConfig:
    return fewer.leave(
        config, self.counts(plan), merged=self._maps, sum_groups=self.router == 'sum'
    )

  def layer(
      self, plan: Mapping[str, Any], path: str, source: base.LeafSource,
      context: base.LayerContext,
  ) -> Iterator[parts.Group]:
    own = plan.get(path)
    if own is None:
      if self._maps:
        leaves = {'expert_map': np.arange(context.num_experts, dtype=np.int32)}
        yield context.group((), lambda: fewer.group_of((), {}, [], leaves))
      return
    own, labels, dominant = self._members(own, path, source, context)
    leaves = self._beside(path, source, context, labels, dominant)
    for start in range(0, own['count'], self.expert_group):
      ids = tuple(range(start, min(start + self.expert_group, own['count'])))
      make = functools.partial(
          self._group, own, path, source, context, labels, dominant, ids, {} if start else leaves
      )
      yield context.group(ids, make)

  def _members(self, own, path, source, context) -> tuple[Any, np.ndarray, np.ndarray]:
    """(the layer's plan, labels, dominant experts), made here where the plan leaves it open."""
    if 'labels' in own:
      return own, np.array(own['labels'], np.int32), np.array(own['dominant'], np.int32)
    if self.sequential:
      sums = on_inputs.sums(functools.partial(fewer.read_experts, source, path), context)
      own = {**own, 'usage': stats_core.usage(sums).tolist(),
             'saliency': prune_core.score('reap', sums).tolist()}
      similarity = functools.partial(self._similarity, path, source, sums, 0)
      groups = self._group_experts(own, own['count'], similarity, sums, 0)
      return own, groups.labels, groups.dominant
    experts = fewer.read_experts(source, path, range(context.num_experts))
    inputs = list(context.inputs(range(context.num_experts)))
    activation = context.act
    if self.similarity == 'mse':
      similarity = lambda: similarity_core.mse(experts, inputs, activation)
    else:
      kind = self.similarity.rpartition('.')[2]
      similarity = lambda: similarity_core.feature_correlation(experts, inputs, activation, kind)
    groups = self._group_experts(own, own['count'], similarity, {}, 0)
    return own, groups.labels, groups.dominant

  def _beside(self, path, source, context, labels, dominant) -> dict[str, np.ndarray]:
    if self._maps:
      return {'expert_map': labels.astype(np.int32)}
    router = fewer.layer_leaves(source, path, fewer.ROUTER)
    if self.router == 'slice':
      return {name: leaf[..., dominant] for name, leaf in router.items()}
    rng = np.random.default_rng(hash_seed(self.seed, zlib.crc32(path.encode())))
    kernel = router['router/kernel']
    std = context.config.init_std(kernel.shape[0])
    fresh = rng.normal(0, std, (kernel.shape[0], int(labels.max()) + 1)).astype(kernel.dtype)
    return {'router/kernel': fresh, **{
        name: np.zeros(fresh.shape[1], leaf.dtype) for name, leaf in router.items()
        if name == 'router/bias'
    }}

  def _group(self, own, path, source, context, labels, dominant, ids, leaves) -> parts.Group:
    made: dict[str, list[np.ndarray]] = {}
    rows = []
    for g in ids:
      members = np.flatnonzero(labels == g)
      leader = next((int(d) for d in dominant if labels[d] == g), int(members[0]))
      experts = fewer.read_experts(source, path, members.tolist())
      one = self._one(own, path, source, context, members, leader, experts)
      one = {name: np.asarray(w).astype(experts[name].dtype) for name, w in one.items()}
      for name, w in one.items():
        made.setdefault(name, []).append(w)
      rows.append({
          'path': f'{path}/experts', 'expert': g, 'transform': self.name,
          'members': members.tolist(), 'dominant': leader,
          'usage': float(np.sum(np.array(own['usage'])[members])),
          'bits_per_weight': fewer.bits_of(one),
          **on_inputs.change(
              experts, one, context.inputs(members), context.act
          ),
      })
    stacked = {name: np.stack(ws) for name, ws in made.items()}
    return fewer.group_of(ids, stacked, rows, leaves)

  def _one(self, own, path, source, context, members, leader, experts) -> Mapping[str, Any]:
    """The merged expert of a group."""
    usage = np.array(own['usage'])[members]
    if len(members) == 1 and not self.compat:
      return {name: w[0] for name, w in experts.items()}
    if self.operator == 'dominant':
      place = int(np.flatnonzero(members == leader)[0])
      return {name: w[place] for name, w in experts.items()}
    if self.operator.startswith('zipit'):
      alike = None
      if self.operator == 'zipit':
        alike = on_inputs.unit_correlation(
            experts, list(context.inputs(members)), context.act
        )
      return merge_core.zip_units(experts, usage, alike)
    aligned, orders = self._aligned(path, source, context, members, leader, experts)
    labels = np.zeros(len(members), np.int32)
    if self.operator == 'fisher':
      found = stats.read_gradients(self.gradients, path, source, 'square')
      information = {name: found[name][members] for name in aligned}
      if orders is not None:
        information = align_core.permute_each(information, orders)
      merged = merge_core.fisher(aligned, labels, information)
    else:
      weight = usage
      if self.operator == 'uniform':
        weight = np.ones(len(members))
      elif self.operator == 'reap':
        weight = np.array(own['saliency'])[members]
      merged = merge_core.weighted(
          aligned, labels, weight, unused='zero' if self.compat else 'mean'
      )
    one = {name: w[0] for name, w in merged.items()}
    if self.operator == 'least_squares':
      one['wo'] = on_inputs.solve_wo(
          one, experts, list(context.inputs(members)), context.act, self.ridge
      )
    return one

  def _aligned(
      self, path, source, context, members, leader, experts
  ) -> tuple[Mapping[str, Any], np.ndarray | None]:
    """A group's experts in one order, and the order of each [e, f]; None where they stay."""
    if self.alignment == 'none' or len(members) == 1:
      return experts, None
    first = self.reference == 'first' and 0 not in members
    if first:
      zero = fewer.read_experts(source, path, [0])
      everyone = {name: np.concatenate([zero[name], w]) for name, w in experts.items()}
      place, ids = 0, [0, *members]
    else:
      everyone, ids = experts, list(members)
      place = ids.index(0 if self.reference == 'first' else leader)
    if self.alignment == 'weights':
      out, orders = align_core.in_one_order(everyone, place, self.include_wo)
    else:
      out, orders = on_inputs.in_one_order(
          everyone, place, list(context.inputs(ids)), context.act,
          with_weights=self.alignment == 'both', include_wo=self.include_wo,
          few_stay=bool(self.compat),
      )
    return ({name: w[1:] for name, w in out.items()}, orders[1:]) if first else (out, orders)

  def predict_layer(
      self, config: ModelConfig, path: str, leaves: Mapping[str, Any], zero_share: Any
  ) -> dict[str, Any]:
    out = super().predict_layer(config, path, leaves, zero_share)
    own = self.foreseen(config).get(path)
    if not self._maps:
      return fewer.predicted_router(out, None if own is None else own['count'])
    held = fewer.experts_held(config)[path]
    return {**out, 'expert_map': jax.ShapeDtypeStruct((held,), np.dtype(np.int32))}


def hash_seed(seed: int, place: int) -> int:
  """A seed of its own for each layer."""
  return int(np.random.SeedSequence((seed, place)).generate_state(1)[0])


def _tokens(sums: Mapping[str, np.ndarray]) -> float:
  """Tokens of the layer: every one has probabilities that add up to 1."""
  return float(sums['probability'].sum())


def merge(
    experts: float | tuple[int, ...] | None = None, *, ratio: float | None = None,
    budget: str = 'global', at_least: int = 1, at_most: int | None = None, layers: str = '.*',
    similarity: str = 'router-logits', grouping: str = 'msmoe', capacity: int | None = None,
    dominant_alone: str = '', alignment: str = 'weights', reference: str = 'dominant',
    include_wo: bool = True, operator: str = 'frequency', router: str = 'remap',
    sequential: bool = False, ridge: float = 1.0, gradients: str = '', compat: str = '',
    expert_group: int = 4, seed: int = 0,
) -> Merge:
  """Merges groups of experts into one each; M-SMoE (arXiv 2310.01334, 3.1) but for its quirks.

  Args:
    experts: groups in each layer, or for each layer in the model's order; with a global budget the
      average over the layers that are merged. ratio: the share of experts that goes instead.
    budget: 'global', one threshold on usage over all layers; or 'uniform'.
    at_least, at_most: bounds of a layer with a global budget.
    layers: a regex of FFN paths; others keep their experts.
    similarity: one of SIMILARITIES; how the experts join.
    grouping: 'msmoe', the most used experts each with those most like them; 'spectral' (UNCURL,
      2409.01483); 'agglomerative', by mean outputs over all tokens (HC-SMoE, 2410.08589);
      'anchored', the most salient experts absorb their nearest (REAM, 2604.04356); 'random', the
      control.
    capacity: members of a group at most ('msmoe'), or what an anchor absorbs ('anchored').
    dominant_alone: 'group': dominant experts stay as they are, the others of each group are merged
      beside them; 'all': all others into one.
    alignment: of hidden units before averaging, by 'weights', by 'activations' (their correlation
      over the group's tokens), by 'both', or 'none'. reference: whose order: the 'dominant'
      expert's of each group, or the 'first' expert's of the layer, as published. include_wo:
      whether wo counts in weights.
    operator: 'frequency', 'uniform', 'reap' (saliency), 'fisher' weigh the average;
      'least_squares' solves for wo besides (MergeMoE, 2510.14436); 'zipit' joins hidden units by
      correlation, 'zipit-weights' by weights; 'dominant' keeps that expert and drops the others.
    router: 'remap', its choices lead to the merged experts (published); 'sum', it chooses among
      the groups by summed probabilities; 'slice', it keeps the rows of the dominant experts;
      'reinit', a new one, to be trained (UNCURL).
    sequential: usage, saliency and similarity of a layer are measured behind the layers merged
      already (REAM), not on the model as it was; how many groups it gets is not.
    ridge: of 'least_squares', see `merge_core.solve_wo`.
    gradients: a file of `compress.gradients`, for 'fisher' and for similarities by gradients.
    compat: 'mcsmoe' for the published defects: experts taken by index in uniform grouping, 1e-7 in
      the average also of single experts, groups no token chose made 0.
    expert_group: merged experts made before they are written; the unit of resume.
    seed: of what is random.

  Raises:
    UserError: an unknown name, or numbers that do not fit each other.
  """
  return Merge(
      **fewer.how_many('merge', experts, ratio), budget=budget, at_least=at_least,
      at_most=at_most, layers=layers,
      similarity=similarity, grouping=grouping, capacity=capacity, dominant_alone=dominant_alone,
      alignment=alignment, reference=reference, include_wo=include_wo, operator=operator,
      router=router, sequential=sequential, ridge=ridge, gradients=gradients, compat=compat,
      expert_group=expert_group, seed=seed,
  )


def msmoe(experts: float | None = None, **changes) -> Merge:
  """`merge` as MC-SMoE publishes it: aligned to each layer's first expert, its quirks kept."""
  return merge(experts, **{'reference': 'first', 'compat': 'mcsmoe', **changes})


def uncurl(experts: float | None = None, **changes) -> Merge:
  """UNCURL (arXiv 2409.01483): spectral clusters of router logits, aligned to the most used expert
  and averaged by usage, behind a new router that is to be trained."""
  return merge(experts, **{
      'grouping': 'spectral', 'budget': 'uniform', 'router': 'reinit', **changes
  })


def hc_smoe(experts: float | None = None, **changes) -> Merge:
  """HC-SMoE (arXiv 2410.08589): clusters of mean outputs, averaged by usage, not aligned."""
  return merge(experts, **{
      'grouping': 'agglomerative', 'budget': 'uniform', 'alignment': 'none', **changes
  })


def ream(experts: float | None = None, **changes) -> Merge:
  """REAM (arXiv 2604.04356): REAP's best absorb their nearest by outputs and gates, weighed by
  saliency, layer after layer; the router keeps their rows."""
  return merge(experts, **{
      'grouping': 'anchored', 'similarity': 'ream', 'budget': 'uniform', 'alignment': 'both',
      'operator': 'reap', 'router': 'slice', 'capacity': 16, 'sequential': True, **changes
  })
