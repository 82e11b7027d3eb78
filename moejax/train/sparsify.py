"""LoSparse's pruning as an optax transformation (arXiv 2306.11222; MC-SMoE 2310.01334, 3.2).

While any optimizer trains, the least important output units (or inputs, or single weights) of the
chosen leaves are set to 0 after each step, under one threshold for all of them and along a cubic
schedule. What is 0 may come back: it is judged again at every step.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moejax import tree
from moejax.errors import UserError, did_you_mean

UNITS = {'output': -2, 'input': -1, 'weight': None}
_REDUCE: dict[str, Callable[..., jax.Array]] = {
    'mean': jnp.mean, 'sum': jnp.sum, 'max': jnp.max, 'min': jnp.min
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruning:
  """How much is pruned when, and by what.

  steps: of the whole training, T. kept: share of weights left at the end. warmup: T_i, steps before
  pruning begins. settle: T_f, steps at the end with the final share (published: 4 * warmup).
  every: steps between two looks in the middle phase; sensitivities in between are averaged.
  smoothing: of the lagged sensitivity |weight * gradient|. uncertainty: PLATON's second smoothing;
  1 leaves it out. score: 'sensitivity' or 'magnitude'. unit: what falls together, 'output' or
  'input' units of a [..., d, f] matrix, or each 'weight'. reduce: a unit's score from its weights'.
  """

  steps: int
  kept: float = 0.1
  warmup: int = 50
  settle: int | None = None
  every: int = 1
  smoothing: float = 0.85
  uncertainty: float = 1.0
  score: str = 'sensitivity'
  unit: str = 'output'
  reduce: str = 'mean'

  def __post_init__(self):
    for name, known in (('unit', UNITS), ('reduce', _REDUCE),
                        ('score', ('sensitivity', 'magnitude'))):
      given = getattr(self, name)
      if given not in known:
        raise UserError(f'{name} = {given!r}: one of {sorted(known)}{did_you_mean(given, known)}')
    if not 0 < self.kept <= 1:
      raise UserError(f'kept = {self.kept}: a share above 0, at most 1')
    if self.every < 1 or self.warmup < 0 or self.warmup + self.last > self.steps:
      raise UserError(
          f'warmup = {self.warmup} and {self.last} steps at the end do not fit into '
          f'steps = {self.steps}; every = {self.every} must be at least 1'
      )

  @property
  def last(self) -> int:
    """T_f."""
    return 4 * self.warmup if self.settle is None else self.settle


def schedule(pruning: Pruning) -> tuple[np.ndarray, np.ndarray]:
  """Share kept at every step, float64 [steps], and whether the step prunes, bool [steps].

  (The formula printed in MC-SMoE's paper exceeds 1 where the slope begins; this is its code's.)
  """
  step = np.arange(pruning.steps)
  slope = pruning.steps - pruning.warmup - pruning.last
  left = 1 - (step - pruning.warmup) / max(slope, 1)
  kept = pruning.kept + (1 - pruning.kept) * left**3
  before, after = step <= pruning.warmup, step > pruning.steps - pruning.last
  kept = np.where(before, 1.0, np.where(after, pruning.kept, kept))
  return kept, ~before & (after | (step % pruning.every == 0))


class State(NamedTuple):
  """step: int32 []. smoothed, latest, uncertainty: by path, as their weight; inner: optimizer's."""

  step: jax.Array
  inner: Any
  smoothed: dict[str, jax.Array]
  latest: dict[str, jax.Array]
  uncertainty: dict[str, jax.Array]


def sparsify(
    optimizer: optax.GradientTransformation, pruning: Pruning, select: Callable[[str], bool]
) -> optax.GradientTransformationExtraArgs:
  """The optimizer, followed by pruning of the leaves whose 'a/b/c' path is selected.

  Raises (on init):
    UserError: no leaf is selected, or one is no matrix [..., d, f].
  """
  inner = optax.with_extra_args_support(optimizer)

  def init(params):
    chosen = {path: leaf for path, leaf in tree.flatten(params).items() if select(path)}
    if not chosen:
      raise UserError('pruning selects no parameter: check its rule against the paths of the model')
    for path, leaf in chosen.items():
      if leaf.ndim < 2:
        raise UserError(f'pruning selects {path} of shape {leaf.shape}; a matrix is needed')
    zeros = lambda: {path: jnp.zeros(leaf.shape, jnp.float32) for path, leaf in chosen.items()}
    return State(
        jnp.zeros([], jnp.int32), inner.init(params), zeros(), zeros(),
        zeros() if pruning.uncertainty < 1 else {},
    )

  def update(grads, state, params=None, **extra):
    updates, inner_state = inner.update(grads, state.inner, params, **extra)
    flat, own, moves = (tree.flatten(t) for t in (grads, params, updates))
    new = {path: own[path] + moves[path].astype(own[path].dtype) for path in state.latest}
    fresh = {
        path: jnp.abs((w * flat[path]).astype(jnp.float32)) for path, w in new.items()
    }
    state = _averaged(state._replace(inner=inner_state), fresh, pruning)
    scores = {path: _score(state, path, w, pruning) for path, w in new.items()}
    falls = _falls(scores, new, state.step, pruning)
    for path, w in new.items():
      moves[path] = jnp.where(falls[path], -own[path].astype(w.dtype), moves[path])
    return tree.unflatten(moves), state._replace(step=state.step + 1)

  return optax.GradientTransformationExtraArgs(init, update)


def _averaged(state: State, fresh: dict[str, jax.Array], pruning: Pruning) -> State:
  """Smooths what the steps before gave; what this one gives counts from the next look on."""
  place = state.step % pruning.every
  smoothed, latest, uncertainty = {}, {}, {}
  for path, now in fresh.items():
    past, old = state.latest[path], state.smoothed[path]
    mean = pruning.smoothing * old + (1 - pruning.smoothing) * past
    smoothed[path] = jnp.where(place == 0, mean, old)
    latest[path] = jnp.where(place == 0, now, (past * place + now) / (place + 1))
    if path in state.uncertainty:
      spread = pruning.uncertainty * state.uncertainty[path] + (
          1 - pruning.uncertainty
      ) * jnp.abs(past - mean)
      uncertainty[path] = jnp.where(place == 0, spread, state.uncertainty[path])
  return state._replace(smoothed=smoothed, latest=latest, uncertainty=uncertainty)


def _score(state: State, path: str, w: jax.Array, pruning: Pruning) -> jax.Array:
  """[..., 1, f], [..., d, 1] or [..., d, f], by unit."""
  score = jnp.abs(w.astype(jnp.float32))
  if pruning.score == 'sensitivity':
    score = state.smoothed[path] * state.uncertainty.get(path, jnp.ones((), jnp.float32))
  axis = UNITS[pruning.unit]
  return score if axis is None else _REDUCE[pruning.reduce](score, axis=axis, keepdims=True)


def _falls(scores, weights, step, pruning: Pruning) -> dict[str, jax.Array]:
  """Which units score strictly below the threshold; none where the step does not prune.

  The threshold is the k-th smallest of all weights' scores; a unit counts as often as it has
  weights, so only units are sorted.
  """
  total = sum(w.size for w in weights.values())
  if total >= 2**31:
    raise UserError(f'{total} weights under one pruning threshold; 32-bit counts hold 2^31')
  kept, prunes = schedule(pruning)
  counts = np.where(prunes, np.floor(total * (1 - kept)), 0).astype(np.int32)
  k = jnp.asarray(counts)[jnp.minimum(step, pruning.steps - 1)]
  flat = jnp.concatenate([s.reshape(-1) for s in scores.values()])
  weight = jnp.concatenate([
      jnp.full(s.size, weights[path].size // s.size, jnp.int32) for path, s in scores.items()
  ])
  order = jnp.argsort(flat)
  place = jnp.searchsorted(jnp.cumsum(weight[order]), k)
  threshold = jnp.where(k > 0, flat[order][jnp.minimum(place, flat.size - 1)], -jnp.inf)
  return {path: s < threshold for path, s in scores.items()}
