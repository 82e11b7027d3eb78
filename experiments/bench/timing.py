"""What a worker does: call functions in turn, and print its rows as one line of JSON."""

from collections.abc import Callable, Mapping
import importlib.metadata
import json
import os
import platform
import sys
import time
from typing import Any

_NAMED = ('jax', 'jaxlib', 'numpy', 'torch', 'transformers')


def cpus() -> int:
  """CPUs this process may use; the parent has pinned it."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def measure(
    fns: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 2, budget_s: float = 15.0
) -> dict[str, list[float]]:
  """Wall seconds of each function, called one after the other, `repeats` times over.

  Every function must block until its result is there. `warmup` rounds go before and do not count.
  No further round starts once the counted ones have taken budget_s; there is at least one.
  """
  for _ in range(warmup):
    for fn in fns.values():
      fn()
  samples: dict[str, list[float]] = {name: [] for name in fns}
  begin = time.perf_counter()
  for _ in range(repeats):
    for name, fn in fns.items():
      start = time.perf_counter()
      fn()
      samples[name].append(time.perf_counter() - start)
    if time.perf_counter() - begin > budget_s:
      break
  return samples


def row(
    case: str, metric: str, who: str, samples: list[float], unit: str = 's', *, ours: bool,
    work: Mapping[str, float] | None = None, **notes: Any,
) -> dict[str, Any]:
  """One measurement; rows of the same case and metric are compared.

  `work` are numbers that must agree between ours and a peer, or they did not do the same.
  """
  return {
      'case': case, 'metric': metric, 'who': who, 'ours': ours, 'unit': unit, 'samples': samples,
      'work': dict(work or {}), **notes,
  }


def run(main: Callable[[bool], list[dict[str, Any]]]) -> None:
  """Runs main(quick) and prints its rows, the versions and the CPUs as the last line of stdout."""
  rows = main('--quick' in sys.argv[1:])
  versions = {'python': platform.python_version()}
  versions |= {name: importlib.metadata.version(name) for name in _NAMED if name in sys.modules}
  sys.stdout.write(json.dumps({'rows': rows, 'versions': versions, 'cpus': cpus()}) + '\n')
