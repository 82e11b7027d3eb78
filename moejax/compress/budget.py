"""Bits of a group of experts held to a budget: a cheap grid for one weight pays for another's."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import numpy as np

from moejax import account
from moejax.compress import matrix, search_core

Grids = Mapping[str, tuple[np.ndarray, np.ndarray]]
# Rounds after which a budget that the fewest bits cannot keep is given up.
_ROUNDS = 4


def within(
    weights: Mapping[str, np.ndarray], hessian_of: Callable[[str], jax.Array],
    settings: matrix.Settings, run: Callable[[Grids], dict[str, matrix.Stored]],
) -> dict[str, matrix.Stored]:
  """What `run` makes of the grids of least error at search.target_bits a weight, as stored.

  Sizes are predicted from samples; where what was made is over the budget, grids are chosen again
  a little lower. A budget under what the metadata and the emptiest grids take gets those, and every
  row of its report says 'over_budget'.

  Args:
    weights: [e, d, f] by name. hessian_of: the undamped Hessians of a weight, [e, d, d].
    run: quantizes with the range and threshold of each matrix by name; none given, as the settings
      say.
  """
  target = settings.budget
  if target is None:
    return run({})
  tried = {
      name: matrix.try_grids(w, hessian_of(name), 'ternary', settings)
      for name, w in weights.items()
  }
  bits_cn = np.concatenate([
      account.ternary_bits_per_weight(
          tried[name].zeros, rows=w.shape[2], cols=w.shape[1], storage=settings.storage,
          level_dtype=matrix.level_dtype(w, settings),
      ) for name, w in weights.items()
  ], axis=1)
  error_cn = np.concatenate([t.error for t in tried.values()], axis=1)
  size_n = np.concatenate([np.full(len(w), w[0].size) for w in weights.values()])
  aim, last = target, None
  made: dict[str, matrix.Stored] = {}
  for _ in range(_ROUNDS):
    pick = search_core.choose(error_cn, bits_cn, size_n, aim)
    if last is not None and (pick == last).all():
      break
    made = run(_by_name(tried, pick))
    stored = _bits_per_weight(made)
    # Under what these grids were predicted to take, so that others are chosen.
    predicted = float(bits_cn[pick, np.arange(len(pick))] @ size_n / size_n.sum())
    aim, last = min(predicted * target / stored, predicted * (1 - 1e-6)), pick
    if stored <= target or settings.max_error is not None:
      break
  over = _bits_per_weight(made) > target and settings.max_error is None
  return {
      name: dataclasses.replace(
          m, rows=tuple({**row, **({'over_budget': True} if over else {})} for row in m.rows)
      ) for name, m in made.items()
  }


def _by_name(tried: Mapping[str, search_core.Tried], pick: np.ndarray) -> Grids:
  ends = np.cumsum([t.error.shape[1] for t in tried.values()])
  return {
      name: (t.grid_scale[own], t.threshold[own])
      for (name, t), own in zip(tried.items(), np.split(pick, ends[:-1]))
  }


def _bits_per_weight(made: Mapping[str, matrix.Stored]) -> float:
  stored: list[Any] = [part.weight for own in made.values() for part in own.parts]
  return sum(map(account.stored_bits, stored)) / sum(int(np.prod(w.shape)) for w in stored)
