"""The workers of each suite, the interpreters they run in, the cores they share, the machine."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
from typing import Any

from moejax import errors

ROOT = pathlib.Path(__file__).parents[2]
THREADS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Worker:
  """A process that measures one side of a part, or both.

  needs: packages, the first of which decides between two interpreters: the newer is taken.
  seconds: about what one run takes on two cores; they weigh the progress bar.
  gpu: whether it measures an NVIDIA card, and is left out where there is none.
  """

  part: str
  module: str
  needs: tuple[str, ...]
  seconds: float
  gpu: bool = False


_JAX = ('jax', 'jaxlib', 'flax')
SUITES: dict[str, tuple[Worker, ...]] = {
    'foundation': (
        Worker(part='forward', module='forward_jax', needs=_JAX, seconds=60),
        Worker(part='forward', module='forward_torch', needs=('torch', 'transformers'), seconds=50),
        Worker(part='gptq', module='gptq_jax', needs=_JAX, seconds=60),
        Worker(part='gptq', module='gptq_torch', needs=('torch',), seconds=140),
        Worker(part='experts', module='experts_jax', needs=_JAX, seconds=110),
        Worker(part='codec', module='codec_jax', needs=_JAX, seconds=40),
    ),
    'decoder': (
        Worker(part='decoder', module='decoder_jax', needs=_JAX, seconds=240),
        Worker(
            part='decoder', module='decoder_torch', needs=('torch', 'transformers'), seconds=150
        ),
        Worker(part='equal', module='dense_jax', needs=_JAX, seconds=400),
    ),
    'merge': (
        Worker(part='merge', module='merge_jax', needs=_JAX, seconds=120),
        Worker(part='merge', module='merge_torch', needs=('torch',), seconds=30),
        Worker(part='fewer', module='fewer_jax', needs=_JAX, seconds=90),
    ),
    'kernels': (
        Worker(part='products', module='kernels_jax', needs=_JAX, seconds=120),
        Worker(part='schedules', module='kernels_tpu', needs=_JAX, seconds=60),
        Worker(part='card', module='kernels_gpu', needs=_JAX, seconds=300, gpu=True),
    ),
    'c2048': (Worker(part='c2048', module='c2048_jax', needs=_JAX, seconds=180),),
    'moefy': (
        Worker(part='neurons', module='moefy_jax', needs=_JAX, seconds=500),
        Worker(part='clusters', module='clusters_jax', needs=_JAX, seconds=15),
        Worker(
            part='clusters', module='clusters_kmeans', needs=('k-means-constrained',), seconds=80
        ),
    ),
}


def pick_cpus(allowed: Sequence[int], siblings: Mapping[int, str]) -> list[int]:
  """The first THREADS of the allowed CPUs that share no core; any, where there are not so many.

  siblings: CPU -> the list of CPUs of its core, as the system writes it.
  """
  first: dict[str, int] = {}
  for cpu in sorted(allowed):
    first.setdefault(siblings.get(cpu, str(cpu)), cpu)
  apart = list(first.values())
  return sorted([*apart, *sorted(set(allowed) - set(apart))][:THREADS])


def pin() -> list[int]:
  """Holds this process, and the workers it starts, to THREADS CPUs; [] where that cannot be."""
  if not hasattr(os, 'sched_setaffinity'):
    return []
  allowed, siblings = os.sched_getaffinity(0), {}
  for cpu in allowed:
    path = pathlib.Path(f'/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list')
    if path.exists():
      siblings[cpu] = path.read_text().strip()
  cpus = pick_cpus(list(allowed), siblings)
  os.sched_setaffinity(0, cpus)
  return cpus


def environment(quick: bool) -> dict[str, str]:
  """The variables every worker gets; flags for XLA and JAX from outside do not reach it.

  All keep the memory they free, as `moejax.train.host_memory` has it in training.
  """
  threads = {f'{n}_NUM_THREADS': str(THREADS) for n in ('OMP', 'OPENBLAS', 'MKL')}
  if quick:  # Tiny sizes say nothing about speed.
    threads['XLA_FLAGS'] = '--xla_backend_optimization_level=0'
  memory = {
      'MALLOC_ARENA_MAX': '1', 'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': str(2**62)
  }
  return {
      'JAX_PLATFORMS': 'cpu', 'HF_HUB_OFFLINE': '1', 'TRANSFORMERS_VERBOSITY': 'error', **threads,
      **memory,
  }


def packages(python: str) -> dict[str, str] | None:
  """Versions of the packages that workers need in an interpreter; None if it does not run."""
  names = sorted({n for suite in SUITES.values() for w in suite for n in w.needs})
  code = (
      'import importlib.metadata as m, json; '
      'found = {d.metadata["Name"]: d.version for d in m.distributions()}; '
      f'print(json.dumps({{n: found[n] for n in {names!r} if n in found}}))'
  )
  try:
    done = subprocess.run([python, '-c', code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)
  except (OSError, subprocess.CalledProcessError, ValueError):
    return None


def interpreters(given: Sequence[str]) -> dict[str, dict[str, str]]:
  """Interpreter -> packages, of the given ones, this one, .venv-new and .venv.

  Raises:
    UserError: a given one does not run.
  """
  found = {}
  own = [sys.executable, *(str(ROOT / v / 'bin' / 'python') for v in ('.venv-new', '.venv'))]
  for python in (*given, *own):
    has = packages(python)
    if has is not None:
      found[python] = has
    elif python in given:
      raise errors.UserError(f'--python {python} is no Python that runs')
  return found


def choose(worker: Worker, found: Mapping[str, Mapping[str, str]]) -> tuple[str | None, str]:
  """The interpreter for a worker, or None and the reason."""
  if worker.gpu and not shutil.which('nvidia-smi'):
    return None, 'no NVIDIA card is here (nvidia-smi was not found)'
  able = [p for p, has in found.items() if all(n in has for n in worker.needs)]
  if not able:
    return None, f'no Python with {" and ".join(worker.needs)} was found (looked in {len(found)})'
  version = lambda p: [int(n) for n in re.findall(r'\d+', found[p][worker.needs[0]])[:4]]
  return max(able, key=version), ''


def run_worker(worker: Worker, python: str, quick: bool) -> tuple[dict[str, Any] | None, str]:
  """What the worker printed, or None and the reason."""
  kept = {k: v for k, v in os.environ.items() if not k.startswith(('XLA_', 'JAX_'))}
  own = environment(quick) | ({'JAX_PLATFORMS': 'cuda'} if worker.gpu else {})
  done = subprocess.run(
      [python, '-m', f'experiments.bench.{worker.module}', *(['--quick'] if quick else [])],
      env={**kept, **own}, cwd=ROOT, capture_output=True, text=True, check=False,
  )
  if done.returncode:
    last = (done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1]
    return None, f'{worker.module} failed: {last[:300]}'
  return json.loads(done.stdout.splitlines()[-1]), ''


def machine() -> dict[str, Any]:
  """CPU model, cores, memory, system, and how busy the machine is."""
  model = platform.processor() or platform.machine()
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  if cpuinfo.exists():
    names = re.findall(r'^model name\s*:\s*(.+)$', cpuinfo.read_text(), re.MULTILINE)
    model = names[0] if names else model
  return {
      'cpu': model, 'cores': os.cpu_count(), 'system': f'{platform.system()} {platform.machine()}',
      'memory_gb': round(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9, 1),
      'load_before': round(os.getloadavg()[0], 2),
  }
