"""A dense layer's neurons as experts, by name of the method (MoEfication, arXiv 2110.01786, 3.2).

Experts hold the same number of neurons. An order of neurons lists those that all tokens share
first, then those of each expert in turn; cut along it, the layer computes what it did.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from moejax.compress import cluster_core, coactivation_core, shared_split_core

SPLITS = ('clusters', 'coactivation', 'shared', 'contiguous', 'random')
# Splits that look at what the neurons do, not at their weights alone.
ACTIVE = ('coactivation', 'shared')
MARKS = 10


@dataclasses.dataclass(frozen=True)
class Parts:
  """order: neurons, int32 [f], the shared ones first. shared: how many these are.

  experts: how many share the rest. representatives: the neuron of each, where the method has one.
  """

  order: np.ndarray
  experts: int
  shared: int = 0
  representatives: np.ndarray | None = None

  @property
  def labels(self) -> np.ndarray:
    """The expert of each neuron of the order behind the shared ones, int32."""
    rest = len(self.order) - self.shared
    return np.repeat(np.arange(self.experts, dtype=np.int32), rest // self.experts)


def split(
    ffn: Mapping[str, Any], experts: int, method: str, *, hidden_mf: np.ndarray | None = None,
    x_md: np.ndarray | None = None, shared: int = 0, weights: str = 'product', seed: int = 0,
) -> Parts:
  """Splits a layer {'wi', 'wo', ...} [d, f] into `experts`.

  Args:
    method: 'clusters' of the neurons' vectors (those of the gate where there is one);
      'coactivation', parts of the graph of neurons that are active together; 'shared', CMoE's, of
      a gated layer; 'contiguous', as they stand; 'random'.
    hidden_mf: hidden units of calibration tokens, for 'coactivation'. x_md: their inputs, for
      'shared'.
    shared: neurons that all tokens share, for 'shared'. weights: of the graph.

  Raises:
    UserError: experts that do not divide the neurons, or tokens that are not there.
  """
  rows = np.asarray(ffn.get('gate', ffn['wi']), np.float32).T
  neurons = len(rows)
  if method == 'shared':
    assert x_md is not None
    hidden = shared_split_core.hidden(x_md, np.asarray(ffn['gate']), np.asarray(ffn['wi']))
    marks = shared_split_core.markers(hidden, min(MARKS, neurons))
    found = shared_split_core.split(marks, experts, shared)
    order = np.concatenate([found.shared, found.routed.reshape(-1)]).astype(np.int32)
    return Parts(order, experts, shared, found.representatives)
  size = cluster_core.expert_size(neurons, experts)
  if method == 'clusters':
    labels = cluster_core.balanced_kmeans(cluster_core.normalised(rows), experts, seed=seed)
  elif method == 'coactivation':
    assert hidden_mf is not None
    total = coactivation_core.add_hidden(None, np.maximum(hidden_mf, 0), weights)
    labels = coactivation_core.partition(coactivation_core.adjacency(total), experts, seed)
  elif method == 'random':
    labels = np.random.default_rng(seed).permutation(neurons) // size
  else:
    labels = np.arange(neurons) // size
  return Parts(np.argsort(labels, kind='stable').astype(np.int32), experts)


def cut(ffn: Mapping[str, Any], parts: Parts) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """(experts wi [e, d, s], wo [e, s, d], ..., shared wi [d, n], ...) of a layer along an order.

  Biases of the hidden units are cut with them, [e, s]; that of the output is no expert's.
  """
  own: dict[str, np.ndarray] = {}
  beside: dict[str, Any] = {}
  for name, w in ffn.items():
    if name == 'wo_bias':
      continue
    axis = 0 if name == 'wo' else -1
    ordered = np.take(np.asarray(w), parts.order, axis)
    head, rest = np.split(ordered, [parts.shared], axis)
    if parts.shared:
      beside[name] = head
    pieces = np.split(rest, parts.experts, axis)
    own[name] = np.stack(pieces)
  return own, beside
