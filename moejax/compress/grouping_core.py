"""Which experts become one: how many groups a layer gets, and who joins whom.

M-SMoE (arXiv 2310.01334, 3.1) takes the most used experts as dominant ones, over all layers at once
or the same number in each, and gives every other expert to its most similar dominant one. UNCURL
(2409.01483) cuts the graph of similarities, HC-SMoE (2410.08589) joins by mean outputs, REAM
(2604.04356) lets the most salient experts absorb their nearest. Labels are int32 [e], each below
the number of groups; ties go to the expert of lower index.
"""

from collections.abc import Mapping
import dataclasses

import numpy as np
from scipy.cluster import hierarchy, vq

from moejax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Groups:
  """dominant: each group's first expert, int32 [g]. labels: each expert's group, int32 [e]."""

  dominant: np.ndarray
  labels: np.ndarray

  @property
  def count(self) -> int:
    return len(self.dominant)


def by_usage(usage_e: np.ndarray) -> np.ndarray:
  """Experts from the most used on, int [e]."""
  return np.argsort(-np.asarray(usage_e), kind='stable')


def global_counts(
    usage: Mapping[str, np.ndarray], average: float, merged: set[str] | None = None,
    at_least: int = 1, at_most: int | None = None,
) -> dict[str, int]:
  """Groups of each layer under one threshold on usage, `average` of them a merged layer.

  Every layer keeps its most used expert. Layers that are not merged keep all. Usages tied with the
  threshold are not kept, so there may be fewer groups than asked. (As many groups as experts give
  every expert its own; the published code loses the least used one.)

  Args:
    usage: layer -> share of its tokens each expert has, [e], in the order of the model.
    average: groups a layer on average. merged: the layers to merge; None for all.
    at_least, at_most: bounds on a layer's groups, applied after the threshold.

  Raises:
    UserError: more groups are asked for than there are experts.
  """
  merged = set(usage) if merged is None else merged
  kept = {}
  for layer, share in usage.items():
    kept[layer] = np.array(share, np.float32)
    kept[layer][np.argmax(share)] = 1.0
    if layer not in merged:
      kept[layer][:] = 1.0
  total = round(sum(average if layer in merged else len(k) for layer, k in kept.items()))
  values = np.sort(np.concatenate(list(kept.values())))[::-1]
  if total == len(values):
    return {layer: len(k) for layer, k in kept.items()}
  if not 0 <= total < len(values) or values[total] == 1.0:
    raise UserError(
        f'{average} groups a layer cannot be made: each of {len(merged)} layers keeps at least one '
        f'and has at most {max(len(k) for k in kept.values())} experts'
    )
  counts = {layer: int((k > values[total]).sum()) for layer, k in kept.items()}
  bound = lambda layer: min(at_most or len(kept[layer]), len(kept[layer]))
  return {
      layer: min(max(n, at_least), bound(layer)) if layer in merged else n
      for layer, n in counts.items()
  }


def assign(
    similarity_ee: np.ndarray, usage_e: np.ndarray, count: int, capacity: int | None = None
) -> Groups:
  """The `count` most used experts are dominant, the others go to the most similar of these.

  Args:
    capacity: members of a group, its dominant counted, after which it takes no more.

  Raises:
    UserError: `count` is not between 1 and the number of experts, or every group is full.
  """
  similarity, order = np.asarray(similarity_ee), by_usage(usage_e)
  _check_count(count, len(order))
  dominant = order[:count]
  labels = np.empty(len(order), np.int32)
  labels[dominant] = np.arange(count)
  sizes, open_ = np.ones(count, int), np.ones(count, bool)
  for expert in order[count:]:
    if not open_.any():
      raise UserError(
          f'{count} groups of at most {capacity} experts do not hold {len(order)} experts'
      )
    label = int(np.argmax(np.where(open_, similarity[expert, dominant], -np.inf)))
    labels[expert] = label
    sizes[label] += 1
    open_[label] = capacity is None or sizes[label] < capacity
  return Groups(dominant.astype(np.int32), labels)


def assign_as_published(similarity_ee: np.ndarray, usage_e: np.ndarray, count: int) -> Groups:
  """The defect of MC-SMoE's uniform grouping: experts are taken by index, not by rank of usage.

  An expert of an index below `count` that is not dominant keeps its own index as its label.
  """
  similarity, order = np.asarray(similarity_ee), by_usage(usage_e)
  _check_count(count, len(order))
  dominant = order[:count]
  labels = np.arange(len(order), dtype=np.int32)
  labels[dominant] = np.arange(count)
  for expert in range(count, len(order)):
    labels[expert] = np.argmax(similarity[expert, dominant])
  return Groups(dominant.astype(np.int32), labels)


def beside_dominant(groups: Groups, together: bool) -> np.ndarray:
  """Labels under which dominant experts stay alone: each group's others are one, or all are.

  Returns int32 [e]: dominant experts first, in their order.
  """
  own = np.full(len(groups.labels), -1)
  own[groups.dominant] = np.arange(groups.count)
  rest = np.zeros_like(groups.labels) if together else groups.labels
  found = np.where(own >= 0, own, groups.count + rest)
  return np.unique(found, return_inverse=True)[1].astype(np.int32)


def spectral(similarity_ee: np.ndarray, usage_e: np.ndarray, count: int, seed: int = 0) -> Groups:
  """UNCURL: k-means on the leading eigenvectors of the normalised graph of similarities."""
  affinity = np.asarray(similarity_ee, np.float64)
  _check_count(count, len(affinity))
  scale = 1 / np.sqrt(affinity.sum(1))
  _, vectors = np.linalg.eigh(affinity * scale[:, None] * scale[None])
  place = vectors[:, -count:] * scale[:, None]
  _, found = vq.kmeans2(place, count, minit='++', seed=np.random.default_rng(seed), iter=100)
  return _of_clusters(found, usage_e, count)


def linkage(vectors_en: np.ndarray) -> np.ndarray:
  """HC-SMoE's tree: average linkage on Euclidean distances, SciPy's [e - 1, 4]."""
  return hierarchy.linkage(
      np.asarray(vectors_en, np.float64), method='average', metric='euclidean'
  )


def agglomerative(vectors_en: np.ndarray, usage_e: np.ndarray, count: int) -> Groups:
  """HC-SMoE (arXiv 2410.08589): the tree of the experts' mean outputs, cut at `count` groups."""
  vectors = np.asarray(vectors_en, np.float64)
  _check_count(count, len(vectors))
  if count == len(vectors):
    return _of_clusters(np.arange(count), usage_e, count)
  clusters = hierarchy.fcluster(linkage(vectors), count, 'maxclust')
  return _of_clusters(clusters, usage_e, count)


def anchored(
    similarity_ee: np.ndarray, saliency_e: np.ndarray, count: int, absorb: int | None = None
) -> Groups:
  """REAM: the most salient experts, in order, each absorb their most similar ones.

  Args:
    saliency_e: REAP's score. absorb: how many one expert takes at most; None for no bound.
  """
  similarity, order = np.asarray(similarity_ee), by_usage(saliency_e)
  _check_count(count, len(order))
  dominant, free = order[:count], list(order[count:])
  labels = np.empty(len(order), np.int32)
  labels[dominant] = np.arange(count)
  for label, anchor in enumerate(dominant):
    # What is left must fit the anchors to come.
    least = 0 if absorb is None else len(free) - absorb * (count - label - 1)
    if label == count - 1:
      least = len(free)
    nearest = sorted(free, key=lambda e: -similarity[anchor, e])
    room = len(free) if absorb is None else absorb
    best = [e for e in nearest if similarity[e, dominant[label:]].argmax() == 0]
    taken = best[:room]
    taken += [e for e in nearest if e not in taken][: max(0, least - len(taken))]
    labels[taken] = label
    free = [e for e in free if e not in taken]
  return Groups(dominant.astype(np.int32), labels)


def random(usage_e: np.ndarray, count: int, seed: int) -> Groups:
  """The control: no group is empty, all else is chance."""
  experts = len(usage_e)
  _check_count(count, experts)
  rng = np.random.default_rng(seed)
  found = np.concatenate([np.arange(count), rng.integers(0, count, experts - count)])
  return _of_clusters(rng.permutation(found), usage_e, count)


def _of_clusters(found: np.ndarray, usage_e: np.ndarray, count: int) -> Groups:
  """Groups of any cluster names, ordered by the usage of their most used member.

  A cluster that came out empty gets the least used expert of the largest one.
  """
  found = np.unique(found, return_inverse=True)[1]
  order = by_usage(usage_e)
  while (clusters := found.max() + 1) < count:
    largest = np.bincount(found).argmax()
    found[[e for e in order if found[e] == largest][-1]] = clusters
  labels = np.empty(len(found), np.int32)
  dominant: list[int] = []
  for expert in order:
    if found[expert] not in [found[d] for d in dominant]:
      labels[found == found[expert]] = len(dominant)
      dominant.append(expert)
  return Groups(np.array(dominant, np.int32), labels)


def _check_count(count: int, experts: int) -> None:
  if not 1 <= count <= experts:
    raise UserError(f'{count} groups of {experts} experts: between 1 and {experts}')
