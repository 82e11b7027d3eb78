"""Adaptive resolution: a cheap model answers, and the full one where the cheap one is not sure.

ARI (arXiv 2408.14528): the margin between a cheap model's two best answers tells where a full model
would say something else. Below a margin, found on held-out inputs, the full model is asked again.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import UserError

Scores = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Account:
  """What adaptive resolution does on some inputs, as shares of them.

  threshold: margins up to it are run again. rerun: that share, F. agreement: answers that are the
  full model's. changed: answers that the cheap model alone would give otherwise. saved: of the full
  model's work, 1 - cost - F, where cost is the cheap model's share of it.
  """

  threshold: float
  rerun: float
  agreement: float
  changed: float
  saved: float


def margins(scores_bc: jax.typing.ArrayLike, probabilities: bool = True) -> jax.Array:
  """How far the best score is before the second, float32 [...]; of c >= 2 scores.

  probabilities: of their softmax; else as they are.
  """
  scores = jnp.asarray(scores_bc, jnp.float32)
  if probabilities:
    scores = jax.nn.softmax(scores, axis=-1)
  best, _ = jax.lax.top_k(scores, 2)
  return best[..., 0] - best[..., 1]


def calibrate(
    cheap_bc: jax.typing.ArrayLike, full_bc: jax.typing.ArrayLike, *, percentile: float = 100.0,
    probabilities: bool = True,
) -> float:
  """The threshold: of the inputs that the models answer otherwise, that percentile of the margins.

  100 changes no answer on these inputs; 99 a few, for fewer that are run again. -1 if the models
  agree on all.

  Args:
    cheap_bc, full_bc: scores of both on held-out inputs, [b, c].

  Raises:
    UserError: no inputs, scores that do not match or that are not finite, a bad percentile.
  """
  cheap, full = np.asarray(cheap_bc, np.float32), np.asarray(full_bc, np.float32)
  if cheap.shape != full.shape or cheap.ndim != 2 or not len(cheap) or cheap.shape[1] < 2:
    raise UserError(
        f'scores of shapes {cheap.shape} and {full.shape}: of the same inputs, [b, c], c at least 2'
    )
  if not (np.isfinite(cheap).all() and np.isfinite(full).all()):
    raise UserError('scores that are not finite have no margin')
  if not 0 <= percentile <= 100:
    raise UserError(f'percentile = {percentile}: in [0, 100]')
  other = cheap.argmax(-1) != full.argmax(-1)
  if not other.any():
    return -1.0
  of_them = np.asarray(margins(cheap, probabilities))[other]
  return float(np.percentile(of_them, percentile, method='higher'))


def account(
    cheap_bc: jax.typing.ArrayLike, full_bc: jax.typing.ArrayLike, threshold: float, *,
    cost: float, probabilities: bool = True,
) -> Account:
  """What a threshold does on inputs whose scores by both models are known.

  cost: the cheap model's work over the full one's.
  """
  cheap, full = np.asarray(cheap_bc), np.asarray(full_bc)
  again = np.asarray(margins(cheap, probabilities)) <= threshold
  answer, wanted = cheap.argmax(-1), full.argmax(-1)
  rerun = float(again.mean())
  return Account(
      threshold=threshold, rerun=rerun, changed=float((answer != wanted).mean()),
      agreement=float((np.where(again, wanted, answer) == wanted).mean()),
      saved=1 - cost - rerun,
  )


def adaptive_resolution(
    cheap: Scores, full: Scores, threshold: float, *, probabilities: bool = True,
    buckets: Sequence[int] = (8, 32, 128, 512),
) -> Callable[..., tuple[jax.Array, np.ndarray]]:
  """A function like `cheap` and `full` that runs `full` only where cheap's margin is small.

  Args:
    cheap, full: arrays with a leading axis of inputs -> scores [b, c]; each is compiled once for
      a shape. For models: `lambda tokens: model.apply(tokens).logits_btv[:, -1]`.
    threshold: of `calibrate`, with the same `probabilities`.
    buckets: numbers of inputs that `full` is compiled for; fewer are filled up with the first.

  Returns:
    A function of the same arrays that gives (scores [b, c], which inputs `full` ran on, bool [b]).

  Raises:
    UserError: no buckets.
  """
  buckets = sorted(buckets)
  if not buckets or buckets[0] < 1:
    raise UserError(f'buckets = {buckets}: numbers of inputs, at least one, each above 0')
  run_cheap = jax.jit(lambda *x: (lambda s: (s, margins(s, probabilities)))(cheap(*x)))
  run_full = jax.jit(lambda at, *x: full(*(a[at] for a in x)))
  put = jax.jit(lambda scores, at, new: scores.at[at].set(new.astype(scores.dtype)))

  def run(*inputs: Any) -> tuple[jax.Array, np.ndarray]:
    scores, margin = run_cheap(*inputs)
    again = ~(np.asarray(margin) > threshold)  # Scores that are no numbers too.
    rows = np.flatnonzero(again)
    for start in range(0, len(rows), buckets[-1]):
      some = rows[start : start + buckets[-1]]
      size = next(n for n in buckets if n >= len(some))
      at = np.concatenate([some, np.full(size - len(some), some[0])])
      scores = put(scores, at, run_full(at, *inputs))
    return scores, again

  return run
