"""Order of an expert's hidden units: two experts matched unit by unit (M-SMoE, 2310.01334, 3.1).

An expert computes the same in any order of its hidden units. Matching puts the units of several
experts in one order, so that their weights can be averaged. An expert is a mapping of wi and, where
gated, gate [d, f], wo [f, d], and biases wi_bias, gate_bias [f], wo_bias [d] where it has them.
"""

from collections.abc import Mapping, Sequence
from concurrent import futures
import functools
import os
from typing import Any

import jax
import numpy as np
from scipy import optimize

from moejax.config import Act
from moejax.ops import ffn
from moejax.ops.linear import linear

EPS = 1e-7


def profit(
    reference: Mapping[str, Any], expert: Mapping[str, Any], include_wo: bool = True
) -> np.ndarray:
  """Inner products of the weights of every pair of units, float32 [f, f]; see `match`.

  Sums over wi, over gate where there is one, and over wo unless it is left out. On the host, where
  the solver is.
  """
  rows = lambda e, name: np.asarray(e[name], np.float32)
  out = rows(reference, 'wi').T @ rows(expert, 'wi')
  if 'gate' in reference:
    out += rows(reference, 'gate').T @ rows(expert, 'gate')
  if include_wo:
    out += rows(reference, 'wo') @ rows(expert, 'wo').T
  return out


def cosine(
    reference: Mapping[str, Any], expert: Mapping[str, Any], include_wo: bool = True
) -> np.ndarray:
  """`profit` as cosines of the units' weights, float32 [f, f]."""
  norms = [np.sqrt(np.diagonal(profit(e, e, include_wo))) for e in (reference, expert)]
  return profit(reference, expert, include_wo) / (np.outer(*norms) + np.float32(EPS))


def correlation(reference_mf: np.ndarray, expert_mf: np.ndarray) -> np.ndarray:
  """Pearson correlation of every pair of hidden units over tokens, float32 [f, f]; see `match`.

  Unbiased moments over m >= 2 tokens; 1e-7 is added to the product of the deviations.
  """
  a, b = (np.asarray(h, np.float32) for h in (reference_mf, expert_mf))
  a, b = a - a.mean(0), b - b.mean(0)
  deviation = [np.sqrt((h * h).sum(0) / (len(a) - 1)) for h in (a, b)]
  return a.T @ b / (len(a) - 1) / (np.outer(*deviation) + np.float32(EPS))


def hidden_units(expert: Mapping[str, Any], x_md: np.ndarray, activation: Act) -> np.ndarray:
  """What wo multiplies, [m, f]; rows are padded to a power of two, so that few shapes compile."""
  rows = 1 << max(len(x_md) - 1, 15).bit_length()
  padded = np.pad(np.asarray(x_md), ((0, rows - len(x_md)), (0, 0)))
  return np.asarray(_hidden_units(dict(expert), padded, activation))[: len(x_md)]


@functools.partial(jax.jit, static_argnames=('activation',))
def _hidden_units(expert, x_md, activation):
  def product(name):
    y = linear(x_md, expert[name])
    return y + expert[f'{name}_bias'][None] if f'{name}_bias' in expert else y

  return ffn.hidden_units(
      activation, product('wi'), product('gate') if 'gate' in expert else None
  )


def match(profit_ff: jax.typing.ArrayLike) -> np.ndarray:
  """The order that maximises the sum of profit[a, order[a]], int32 [f]: for unit a of the
  reference, the expert's unit that goes in its place (SciPy's assignment solver)."""
  profit = np.asarray(profit_ff, np.float64)
  # The same optimum, a fifth sooner: what each unit lacks to the best of its row and column.
  cost = profit.max(1, keepdims=True) - profit
  cost -= cost.min(0)[None]
  return optimize.linear_sum_assignment(cost)[1].astype(np.int32)


def permute(expert: Mapping[str, Any], order_f: jax.typing.ArrayLike) -> dict[str, Any]:
  """The expert with its hidden units in another order; its outputs stay the same."""
  order = np.asarray(order_f)
  out = dict(expert)
  for name in ('wi', 'gate', 'wi_bias', 'gate_bias'):
    if name in expert:
      out[name] = expert[name][..., order]
  out['wo'] = expert['wo'][order]
  return out


def permute_each(
    experts: Mapping[str, Any], orders_ef: np.ndarray
) -> dict[str, np.ndarray]:
  """`permute` for experts [e, ...], or what else lies as their weights do, each in its order."""
  out = {name: np.array(w) for name, w in experts.items()}
  for e, order in enumerate(orders_ef):
    for name, w in permute({name: w[e] for name, w in experts.items()}, order).items():
      out[name][e] = w
  return out


def in_one_order(
    experts: Mapping[str, Any], reference: int, include_wo: bool = True,
    members: Sequence[int] | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Experts with hidden units in the order of a reference expert, by matching weights.

  Experts are matched side by side: the solver holds no lock of Python's.

  Returns:
    (the experts [e, ...], their orders int32 [e, f]); those not in `members` stay as they are.
  """
  count, units = np.shape(experts['wo'])[:2]
  orders = np.tile(np.arange(units, dtype=np.int32), (count, 1))
  one = lambda e: {name: w[e] for name, w in experts.items()}
  order_of = lambda e: match(profit(one(reference), one(e), include_wo))
  others = [e for e in (range(count) if members is None else members) if e != reference]
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for e, order in zip(others, pool.map(order_of, others)):
      orders[e] = order
  return permute_each(experts, orders), orders
