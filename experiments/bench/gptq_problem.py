"""The GPTQ task that every peer gets, and the rows that come of it."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.bench import timing

BLOCK, DAMPING = 128, 0.1
# (outputs, inputs): the Hessian is inputs x inputs.
SHAPES, SMALL = ((768, 3072), (3072, 768)), ((24, 150), (40, 16))


def sizes(quick: bool) -> tuple[int, tuple[tuple[int, int], ...]]:
  """Experts, and their shapes."""
  return (2, SMALL) if quick else (16, SHAPES)


def problem(experts: int, outputs: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
  """Weights [e, outputs, inputs] and Hessians [e, inputs, inputs] of 2 * inputs tokens, float32."""
  rng = np.random.default_rng(0)
  w = rng.standard_normal((experts, outputs, inputs), np.float32)
  x = rng.standard_normal((2 * inputs, inputs), np.float32)
  x *= np.linspace(0.2, 2.0, inputs, dtype=np.float32)
  h = x.T @ x / np.float32(2 * inputs)
  return w, h[None] * np.linspace(0.5, 2.0, experts, dtype=np.float32)[:, None, None]


def rows(
    shape: tuple[int, int], experts: int, who: str, factor: Callable[[], Any],
    sweep: Callable[[], Any], work: Mapping[str, float], *, ours: bool, repeats: int = 2,
) -> list[dict[str, Any]]:
  """Times factorisations and the rest in turn; rows of both, of the sum and of their share.

  The caller has called both once, for `work`: that is the warm-up.
  """
  timed = timing.measure({'factor': factor, 'sweep': sweep}, repeats=repeats, warmup=0)
  total = [f + s for f, s in zip(timed['factor'], timed['sweep'])]
  share = [100 * f / t for f, t in zip(timed['factor'], total)]
  case = f'{experts} experts {shape[0]}x{shape[1]}, Hessian {shape[1]}'
  row = lambda metric, samples, unit='s': timing.row(
      case, metric, who, samples, unit, ours=ours, work=work
  )
  return [
      row('outside the factorisations', timed['sweep']),
      row('in total', total),
      row('factorisations', timed['factor']),
      row('share of the factorisations', share, '%'),
  ]
