"""Timing inside a worker process, and the workers' one-line JSON protocol."""

from collections.abc import Callable
import json
import statistics
import sys
import time
from typing import Any


def median_ms(fn: Callable[[], Any], repeats: int = 7, warmup: int = 2) -> dict[str, float]:
  """Median, least and greatest wall milliseconds of fn(), which must block until done."""
  for _ in range(warmup):
    fn()
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    fn()
    times.append((time.perf_counter() - start) * 1e3)
  return {'median_ms': statistics.median(times), 'min_ms': min(times), 'max_ms': max(times)}


def emit(rows: list[dict[str, Any]]) -> None:
  """Prints the worker's rows as the last line of stdout."""
  sys.stdout.write(json.dumps(rows) + '\n')
