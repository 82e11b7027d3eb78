"""What a merge looks up on the inputs of a group's experts: orders, a new wo, what it changed.

Experts are a mapping of weights [e, ...]; inputs are [m_e, d], of each expert its own tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.compress import align_core, merge_core, stats_core
from moejax.config import Act
from moejax.ops import ffn

Experts = Mapping[str, Any]
_ROWS = 2048


def in_one_order(
    experts: Experts, reference: int, inputs: Sequence[np.ndarray], activation: Act, *,
    with_weights: bool = False, include_wo: bool = True, few_stay: bool = False,
) -> tuple[Experts, np.ndarray]:
  """`align_core.in_one_order` by correlation over all the inputs.

  Args:
    with_weights: adds the cosines of the units' weights (`align_core.cosine`).
    few_stay: with one token at most nothing is reordered, as published; else weights decide.
  """
  x = np.concatenate(inputs)
  count, width = np.shape(experts['wo'])[:2]
  orders = np.tile(np.arange(width, dtype=np.int32), (count, 1))
  if len(x) <= 1:
    same = experts, orders
    return same if few_stay else align_core.in_one_order(experts, reference, include_wo)
  units = align_core.hidden_units(_one(experts, reference), x, activation)
  for e in range(count):
    if e == reference:
      continue
    own = _one(experts, e)
    score = align_core.correlation(units, align_core.hidden_units(own, x, activation))
    if with_weights:
      score = score + align_core.cosine(_one(experts, reference), own, include_wo)
    orders[e] = align_core.match(score)
  return align_core.permute_each(experts, orders), orders


def unit_correlation(
    experts: Experts, inputs: Sequence[np.ndarray], activation: Act
) -> np.ndarray | None:
  """Of all hidden units of all experts over all the inputs, or None for too few of them."""
  x = np.concatenate(inputs)
  if len(x) <= 1:
    return None
  units = np.concatenate([
      align_core.hidden_units(_one(experts, e), x, activation) for e in range(len(inputs))
  ], 1)
  return align_core.correlation(units, units)


def solve_wo(
    merged: Experts, experts: Experts, inputs: Sequence[np.ndarray], activation: Act, ridge: float
) -> Any:
  """`merge_core.solve_wo` for a merged expert [d, f]; its own wo where there are no inputs."""
  if not sum(map(len, inputs)):
    return merged['wo']
  hidden = np.concatenate([align_core.hidden_units(merged, x, activation) for x in inputs])
  wanted = np.concatenate([output(_one(experts, e), x, activation) for e, x in enumerate(inputs)])
  return merge_core.solve_wo(hidden, wanted, merged['wo'], ridge)


def sums(read: Callable[[Sequence[int]], Experts], context: Any) -> stats_core.Sums:
  """What `stats_core` sums of a layer to group its experts, behind the layers before as they are.

  Args:
    read: experts -> their weights. context: a `base.LayerContext` of a step that `sees_logits`.
  """
  experts, activation = range(context.num_experts), context.act
  total = {name: np.zeros(len(experts)) for name in ('tokens', 'gate_norm')}
  means = []
  for e, x, gate in zip(experts, context.inputs(experts), context.gates(experts)):
    own = _one(read([e]), 0)
    total['tokens'][e] = len(x)
    means.append(np.zeros(x.shape[1]))
    for start in range(0, len(x), _ROWS):
      piece = slice(start, start + _ROWS)
      y = output(own, x[piece], activation).astype(np.float64)
      total['gate_norm'][e] += (gate[piece] * np.linalg.norm(y, axis=1)).sum()
      means[-1] += y.sum(0)
  logits = context.logits().astype(np.float64)
  return {**total, 'output': np.stack(means), 'gram': logits.T @ logits}


def change(
    experts: Experts, merged: Experts, inputs: Iterable[np.ndarray], activation: Act
) -> dict[str, Any]:
  """How far the merged expert is from each token's own, and over how many tokens."""
  off, size, tokens = 0.0, 0.0, 0
  for e, x in enumerate(inputs):
    if not len(x):
      continue
    tokens += len(x)
    own = output(_one(experts, e), x, activation)
    off += float(np.square(output(merged, x, activation) - own).sum(dtype=np.float64))
    size += float(np.square(own).sum(dtype=np.float64))
  return {'tokens': tokens, 'relative_output_error': (off / size) ** 0.5 if size else None}


def _one(experts: Experts, e: int) -> dict[str, Any]:
  return {name: w[e] for name, w in experts.items()}


def output(expert: Experts, x_md: np.ndarray, activation: Act) -> np.ndarray:
  """What an expert gives, [m, d]; rows are padded to a power of two, so that few shapes compile."""
  rows = 1 << max(len(x_md) - 1, 15).bit_length()
  padded = jnp.asarray(np.pad(x_md, ((0, rows - len(x_md)), (0, 0))))
  own = {name: jnp.asarray(w) for name, w in expert.items()}
  return np.asarray(_dense(own, padded, activation))[: len(x_md)]


@functools.partial(jax.jit, static_argnames=('activation',))
def _dense(expert, x_md, activation):
  return ffn.dense_ffn(expert, x_md, activation)
