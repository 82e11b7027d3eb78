"""How many experts each split layer runs within a budget: a predictor of the loss, and a search.

After pruning by an accuracy predictor (arXiv 2309.09507): some allocations are measured, a model of
their losses is fitted, many others are told by it. The model here adds up a curve for each layer,
so that its best allocation is found exactly.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from moejax.errors import UserError

RIDGE = 1e-3


@dataclasses.dataclass(frozen=True)
class Predictor:
  """Loss as a sum over layers of a curve in the share s that runs: of s, s^2 and log s.

  weights_lp: float64 [l, 3], of the features as `mean_lp` and `scale_lp` make them. base: the mean
  loss.
  """

  weights_lp: np.ndarray
  mean_lp: np.ndarray
  scale_lp: np.ndarray
  base: float

  def __call__(self, shares_cl: np.ndarray) -> np.ndarray:
    """The losses of allocations of shares in (0, 1], float64 [c]."""
    return self.base + self.parts(shares_cl).sum(-1)

  def parts(self, shares_cl: np.ndarray) -> np.ndarray:
    """What each layer adds, float64 [c, l]."""
    x_clp = (_features(shares_cl) - self.mean_lp) / self.scale_lp
    return (x_clp * self.weights_lp).sum(-1)


def _features(shares_cl: np.ndarray) -> np.ndarray:
  s = np.asarray(shares_cl, np.float64)
  return np.stack([s, s * s, np.log(s)], -1)


def fit(shares_cl: np.ndarray, losses_c: np.ndarray, ridge: float = RIDGE) -> Predictor:
  """A ridge regression of losses on the features of shares.

  Args:
    shares_cl: in (0, 1]. ridge: times the number of measurements.

  Raises:
    UserError: fewer than three measurements, or one that is not finite.
  """
  losses = np.asarray(losses_c, np.float64)
  if len(losses) < 3 or not np.isfinite(losses).all():
    raise UserError(
        f'{int(np.isfinite(losses).sum())} of {len(losses)} measured losses are finite: a '
        'predictor needs at least three, all finite'
    )
  x_clp = _features(shares_cl)
  mean, scale = x_clp.mean(0), np.maximum(x_clp.std(0), 1e-9)
  x = ((x_clp - mean) / scale).reshape(len(losses), -1)
  gram = x.T @ x + ridge * len(losses) * np.eye(x.shape[1])
  weights = np.linalg.solve(gram, x.T @ (losses - losses.mean()))
  return Predictor(weights.reshape(mean.shape), mean, scale, float(losses.mean()))


def explained(predictor: Predictor, shares_cl: np.ndarray, losses_c: np.ndarray) -> float:
  """R^2: the share of the variance of losses that the predictor explains."""
  losses = np.asarray(losses_c, np.float64)
  total = np.square(losses - losses.mean()).sum()
  return float(1 - np.square(predictor(shares_cl) - losses).sum() / max(total, 1e-300))


def best(predictor: Predictor, experts_l: Sequence[int], budget: int) -> np.ndarray:
  """The allocation of least predicted loss with at most `budget` experts in all, int64 [l].

  Exact, by dynamic programming over layers; every layer runs at least one.

  Raises:
    UserError: a budget below one expert a layer.
  """
  layers = len(experts_l)
  if budget < layers:
    raise UserError(f'a budget of {budget} experts for {layers} layers: at least one each')
  least, choice = np.zeros(budget + 1), np.zeros((layers, budget + 1), np.int64)
  for i, experts in enumerate(experts_l):
    counts = np.arange(1, experts + 1)
    shares = np.ones((experts, layers))
    shares[:, i] = counts / experts
    cost = predictor.parts(shares)[:, i]
    new = np.full(budget + 1, np.inf)
    for k, add in zip(counts[:budget], cost):
      with_k = least[: budget + 1 - k] + add
      better = with_k < new[k:]
      new[k:] = np.where(better, with_k, new[k:])
      choice[i, k:] = np.where(better, k, choice[i, k:])
    least = new
  left, chosen = int(np.argmin(least)), np.zeros(layers, np.int64)
  for i in reversed(range(layers)):
    chosen[i] = choice[i, left]
    left -= chosen[i]
  return chosen


def drawn(
    experts_l: Sequence[int], budget: int, count: int, rng: np.random.Generator
) -> np.ndarray:
  """Random allocations of about `budget` experts, never more, int64 [count, l].

  Layers draw weights of a log-normal law and share the budget by them.
  """
  experts = np.asarray(experts_l, np.float64)
  weights = experts * np.exp(0.7 * rng.normal(size=(count, len(experts))))
  for _ in range(8):  # What is over a layer's experts goes to the others.
    shares = weights / weights.sum(1, keepdims=True) * budget
    weights = np.where(shares > experts, weights * experts / np.maximum(shares, 1e-9), weights)
  found = np.clip(np.floor(shares), 1, experts).astype(np.int64)
  over = found.sum(1) > budget
  while over.any():
    rows = np.flatnonzero(over)
    found[rows, found[rows].argmax(1)] -= 1
    over = found.sum(1) > budget
  return found


def uniform(experts_l: Sequence[int], budget: int) -> np.ndarray:
  """The same share in every layer, int64 [l]; what rounding leaves over goes to the first ones."""
  experts = np.asarray(experts_l, np.int64)
  found = np.clip(experts * budget // int(experts.sum()), 1, experts)
  while found.sum() > budget and found.max() > 1:
    found[found.argmax()] -= 1
  for i in range(len(experts)):
    if found.sum() < budget and found[i] < experts[i]:
      found[i] += 1
  return found
