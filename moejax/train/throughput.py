"""FLOPs of a training step from shapes, the peak they are a share of, and the meter of a run."""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import account
from moejax import config as config_lib
from moejax.data import batches as batches_lib


def train_flops(config: config_lib.ModelConfig, samples: int, source: int, target: int) -> float:
  """Operations of a training step: forward, and twice that backward; recomputation not counted."""
  return 3.0 * samples * account.forward_flops(config, source, target)


def measure_peak(dtype: Any, seconds: float = 0.3) -> float:
  """Best floating-point rate of a plain matmul on one device, operations a second."""
  n = 2048 if jax.default_backend() == 'cpu' else 8192
  a = jnp.ones((n, n), dtype)
  dot = jax.jit(lambda x: jnp.dot(x, x))
  jax.block_until_ready(dot(a))
  best, end = math.inf, time.perf_counter() + seconds
  while time.perf_counter() < end:
    start = time.perf_counter()
    jax.block_until_ready(dot(a))
    best = min(best, time.perf_counter() - start)
  return 2.0 * n**3 / best if best < math.inf else 0.0


class Meter:
  """Averages metrics between two log lines and turns them into speeds.

  The very first step, which compiles, counts in the means but not in the speeds.
  """

  def __init__(self, flops_per_step: float, peak: float):
    self._flops, self._peak = flops_per_step, peak
    self._rows: list[Any] = []
    self._compiled = False
    self.reset()

  def reset(self) -> None:
    """Starts a new interval now."""
    self._rows.clear()
    self._untimed = 0
    self._start = time.monotonic()

  def add(self, metrics: Any) -> None:
    """Takes a step's metrics; waits for the step before the last, so that none runs far ahead."""
    self._rows.append(metrics)
    if len(self._rows) > 2:
      jax.block_until_ready(self._rows[-3])
    if not self._compiled:
      jax.block_until_ready(metrics)
      self._compiled, self._untimed = True, 1
      self._start = time.monotonic()

  def means(self) -> dict[str, Any]:
    """Waits for the steps of the interval and closes it; speeds are left out if none was timed."""
    rows = jax.device_get(self._rows)
    timed = rows[self._untimed :]
    seconds = time.monotonic() - self._start
    means = {name: np.mean([row[name] for row in rows], axis=0) for name in rows[0]}
    if timed:
      means['tokens_per_second'] = sum(row['tokens'] for row in timed) / seconds
      means['seconds_per_step'] = seconds / len(timed)
      if self._peak > 0:
        means['model_flops_utilisation'] = self._flops * len(timed) / seconds / self._peak
    self.reset()
    return means


def make_meter(
    experiment: config_lib.Experiment, batches: batches_lib.Batches, devices: int
) -> Meter:
  """A meter that knows the FLOPs of a step on such batches and the peak of all devices."""
  train = experiment.train
  peak = train.peak_flops_per_second or measure_peak(train.compute_dtype)
  widths = {name: array.shape[1] for name, array in batches.spec.items()}
  source, target = widths.get('encoder_tokens', 0), widths['targets']
  flops = train_flops(experiment.model, train.batch_size, source, target)
  return Meter(flops, peak * devices)
