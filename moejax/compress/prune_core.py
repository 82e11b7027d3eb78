"""Which experts a layer can do without, and which parts of an expert: scores and choices.

A score is a saliency, float [e]: the least salient go. Sums over tokens are those of `stats_core`.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import UserError, did_you_mean

Sums = Mapping[str, np.ndarray]


def _mean(name: str) -> Callable[[Sums], np.ndarray]:
  return lambda sums: np.asarray(sums[name]) / np.maximum(sums['tokens'], 1)


# Method -> saliency from an expert's sums over the tokens routed to it (facts of the papers below).
SCORES: dict[str, Callable[[Sums], np.ndarray]] = {
    'frequency': lambda sums: np.asarray(sums['tokens']),
    'soft_frequency': lambda sums: np.asarray(sums['gate']),
    'ean': lambda sums: np.asarray(sums['norm']),
    'man': _mean('norm'),
    'msan': _mean('square_norm'),
    'reap': _mean('gate_norm'),
}


def score(method: str, sums: Sums) -> np.ndarray:
  """Saliency by a method of SCORES, float64 [e]; an expert that no token chose has 0.

  reap: mean of gate * |output| (REAP, arXiv 2510.13999, eq. 9); ean: sum of |output|; man, msan:
  mean of |output|, of its square; frequency: tokens; soft_frequency: sum of gates.

  Raises:
    UserError: an unknown method, or a sum that is not finite.
  """
  if method not in SCORES:
    raise UserError(
        f'method = {method!r}: one of {sorted(SCORES)}{did_you_mean(method, SCORES)}'
    )
  found = SCORES[method](sums).astype(np.float64)
  if (bad := np.flatnonzero(~np.isfinite(found))).size:
    raise UserError(f'{method}: the statistics of experts {bad.tolist()} are not finite')
  return found


def aimer(experts: Mapping[str, Any]) -> np.ndarray:
  """AIMER (arXiv 2603.18492), without data: minus mean |w| / RMS(w) over an expert's weights."""
  flat = lambda w: jnp.asarray(w, jnp.float32).reshape(w.shape[0], -1)
  size = sum(math.prod(w.shape[1:]) for w in experts.values())
  total = sum(jnp.abs(flat(w)).sum(1) for w in experts.values())
  square = sum((flat(w) ** 2).sum(1) for w in experts.values())
  return -np.asarray(total / size / jnp.sqrt(square / size), np.float64)


def keep(score_e: np.ndarray, count: int) -> np.ndarray:
  """The `count` most salient experts in the order of the model, int32 [count].

  Of equals the first are kept.

  Raises:
    UserError: `count` is not between 1 and the number of experts.
  """
  if not 1 <= count <= len(score_e):
    raise UserError(f'{count} of {len(score_e)} experts to keep: between 1 and {len(score_e)}')
  return np.sort(np.argsort(-np.asarray(score_e), kind='stable')[:count]).astype(np.int32)


def keep_globally(
    scores: Mapping[str, np.ndarray], average: float, at_least: int = 1,
    at_most: int | None = None,
) -> dict[str, np.ndarray]:
  """Experts to keep in each layer so that `average` are kept a layer, under one threshold.

  Layers differ in scale, so an expert counts by its share of its layer's scores. Of equals those of
  earlier layers are kept.

  Raises:
    UserError: the bounds leave no way to keep so many, or scores are negative.
  """
  total = round(average * len(scores))
  floors = {layer: min(at_least, len(s)) for layer, s in scores.items()}
  ceilings = {layer: min(at_most or len(s), len(s)) for layer, s in scores.items()}
  if at_least < 1 or not sum(floors.values()) <= total <= sum(ceilings.values()):
    raise UserError(
        f'{average} experts a layer cannot be kept in {len(scores)} layers of '
        f'{max(map(len, scores.values()))} with at_least = {at_least}, at_most = {at_most}'
    )
  kept = {layer: list(keep(s, floors[layer])) for layer, s in scores.items()}
  shares = []
  for place, (layer, s) in enumerate(scores.items()):
    if np.min(s) < 0:
      raise UserError(f'{layer}: negative scores have no shares; use the same number in each layer')
    share = np.asarray(s, np.float64) / max(np.sum(s), np.finfo(np.float64).tiny)
    order = np.argsort(-share, kind='stable')
    shares += [(-share[e], place, rank, layer, e) for rank, e in enumerate(order)
               if rank >= floors[layer]]
  left = total - sum(floors.values())
  for _, _, _, layer, expert in sorted(shares):
    if left and len(kept[layer]) < ceilings[layer]:
      kept[layer].append(expert)
      left -= 1
  return {layer: np.sort(np.array(chosen, np.int32)) for layer, chosen in kept.items()}


def gates_of(logits_me: np.ndarray, top_k: int) -> np.ndarray:
  """Softmax over the top-k logits, 0 elsewhere, float64 [m, e]."""
  logits = np.asarray(logits_me, np.float64)
  best = np.argsort(-logits, axis=1, kind='stable')[:, :top_k]
  picked = np.take_along_axis(logits, best, 1)
  weight = np.exp(picked - picked.max(1, keepdims=True))
  out = np.zeros_like(logits)
  np.put_along_axis(out, best, weight / weight.sum(1, keepdims=True), 1)
  return out


def best_subset(
    outputs_emd: np.ndarray, logits_me: np.ndarray, count: int, top_k: int,
    gates: Callable[[np.ndarray], np.ndarray] | None = None, most: int = 20_000,
) -> tuple[np.ndarray, float]:
  """NAEE (arXiv 2402.14800): the experts whose layer output is nearest to that of all.

  Tries every subset of `count` experts where there are at most `most` of them; else drops one
  expert after another, each time that whose loss hurts least.

  Args:
    outputs_emd: every expert on every sample token. logits_me: the router's.
    gates: of logits [m, n] over any n experts, [m, n]; None is softmax over their top-k, as
      Mixtral's router has it.

  Returns:
    (int32 [count] in the order of the model, Frobenius norm of the difference).
  """
  outputs, experts = np.asarray(outputs_emd, np.float64), len(outputs_emd)
  if not top_k <= count <= experts:
    raise UserError(f'{count} of {experts} experts to keep: between top_k = {top_k} and {experts}')
  gates = gates or functools.partial(gates_of, top_k=top_k)
  full = gates(np.asarray(logits_me))
  # |sum (g - g') y|^2 needs only the inner products of a token's outputs.
  products = np.einsum('emd,cmd->mec', outputs, outputs)

  def error(chosen: Sequence[int]) -> float:
    index = list(chosen)
    moved = full.copy()
    moved[:, index] -= gates(np.asarray(logits_me)[:, index])
    return max(float(np.einsum('me,mec,mc->', moved, products, moved)), 0.0)

  if math.comb(experts, count) <= most:
    best = min(itertools.combinations(range(experts), count), key=error)
  else:
    best = tuple(range(experts))
    while len(best) > count:
      best = min((best[:i] + best[i + 1 :] for i in range(len(best))), key=error)
  return np.array(best, np.int32), math.sqrt(error(best))


def skip_threshold(gates_mk: np.ndarray) -> float:
  """NAEE's beta: a token's second expert is skipped if gate_2 < beta * gate_1; median of ratios."""
  gates = np.sort(np.asarray(gates_mk, np.float64), axis=1)[:, ::-1]
  if gates.shape[1] != 2:
    raise UserError(f'dynamic skipping is for top-2 routing, not top-{gates.shape[1]}')
  return float(np.median(gates[:, 1] / gates[:, 0]))


def task_specific(
    usage_e: np.ndarray, alive_e: np.ndarray, beta: float, minimum: int, last: bool = False
) -> np.ndarray:
  """One round of task-specific pruning (arXiv 2206.00277), bool [e].

  Of the experts alive those stay whose share of the tokens of all alive is above beta / #alive; the
  `minimum` most used stay if fewer would, and in the last round.
  """
  alive = np.asarray(alive_e, bool)
  share = np.where(alive, usage_e, 0.0)
  share = share / max(share.sum(), np.finfo(np.float64).tiny)
  stays = alive & (share > beta / alive.sum())
  if last or stays.sum() < minimum:
    stays = np.zeros_like(alive)
    stays[np.argsort(-np.where(alive, share, -1.0), kind='stable')[:minimum]] = True
  return stays


def unit_score(wo_fd: jax.typing.ArrayLike, square_sum_f: jax.typing.ArrayLike) -> jax.Array:
  """What each hidden unit adds to the output: |wo row| * norm of the unit over tokens, [..., f]."""
  norm = jnp.linalg.norm(jnp.asarray(wo_fd, jnp.float32), axis=-1)
  return norm * jnp.sqrt(jnp.asarray(square_sum_f, jnp.float32))


def n_of_m(
    w_df: jax.typing.ArrayLike, square_sum_d: jax.typing.ArrayLike, n: int, m: int
) -> jax.Array:
  """MoE-Pruner (arXiv 2410.12013): of every m inputs of an output the n with most |w| * |x * gate|.

  Args:
    w_df: [d, f]. square_sum_d: of each input times its token's gate. n, m: 2, 4 for 2:4.

  Returns:
    w with 0 elsewhere. Raises UserError unless m divides d and 1 <= n <= m.
  """
  w = jnp.asarray(w_df)
  if not 1 <= n <= m or w.shape[0] % m:
    raise UserError(f'{n}:{m} does not fit {w.shape[0]} inputs: m divides them, n is at most m')
  alike = jnp.abs(w.astype(jnp.float32)) * jnp.sqrt(
      jnp.asarray(square_sum_d, jnp.float32)
  )[:, None]
  blocks = alike.reshape(-1, m, w.shape[1])
  rank = jnp.argsort(jnp.argsort(-blocks, axis=1, stable=True), axis=1)
  return jnp.where((rank < n).reshape(w.shape), w, 0)
