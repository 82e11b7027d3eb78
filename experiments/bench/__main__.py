"""Measures moejax and its peers on this machine, each in a process of its own.

Example:
  python -m experiments.bench --suite foundation --out runs/bench.json

Our side runs in .venv-new (Python 3.12, newest JAX) where it exists, since JAX's speed on CPU
depends on it; PyTorch peers run where torch is installed. Peers alternate for several rounds; a row
is the median of the rounds' medians.
"""

import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
from typing import Any

from absl import flags
import tqdm

from experiments import flags as common
from moejax import errors

_SUITE = flags.DEFINE_string('suite', 'foundation', 'Which suite to run.')
_OUT = flags.DEFINE_string('out', None, 'Also write the rows to this JSON file.')
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Rounds over all workers.')

# suite: workers, each (module, whether it needs torch)
SUITES = {
    'foundation': (
        ('forward_jax', False),
        ('forward_torch', True),
        ('gptq_jax', False),
        ('gptq_torch', True),
        ('experts_jax', False),
        ('codec_jax', False),
    ),
}


def interpreter(torch: bool) -> str | None:
  """The Python that runs a worker; None if there is none with torch."""
  if not torch:
    new = pathlib.Path('.venv-new/bin/python')
    return str(new) if new.exists() else sys.executable
  for python in (sys.executable, '.venv/bin/python'):
    probe = [python, '-c', 'import torch, transformers']
    if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
      return python
  return None


def run_worker(module: str, python: str) -> list[dict[str, Any]]:
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '2'}
  done = subprocess.run(
      [python, '-m', f'experiments.bench.{module}'], env=env, capture_output=True, text=True,
      check=False,
  )
  if done.returncode:
    raise errors.UserError(f'bench worker {module} failed: {done.stderr.strip()[-400:]}')
  return json.loads(done.stdout.strip().splitlines()[-1])


def merge(rounds: list[dict[str, Any]]) -> dict[str, Any]:
  """One row of several rounds: medians of numbers, the rest as in the first."""
  row = dict(rounds[0])
  for name, value in row.items():
    if isinstance(value, (int, float)) and not isinstance(value, bool):
      row[name] = statistics.median(r[name] for r in rounds)
  row['rounds'] = len(rounds)
  return row


def machine() -> str:
  model = platform.processor()
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  if cpuinfo.exists():
    for line in cpuinfo.read_text().splitlines():
      if line.startswith('model name'):
        model = line.split(':', 1)[1].strip()
        break
  return f'{model}, {os.cpu_count()} cores'


def table(rows: list[dict[str, Any]]) -> str:
  lines = ['| bench | implementation | median ms | other |', '|---|---|---|---|']
  for row in rows:
    shown = ('bench', 'implementation', 'median_ms', 'min_ms', 'max_ms', 'rounds')
    other = ', '.join(
        f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}'
        for k, v in row.items() if k not in shown
    )
    ms = f'{row["median_ms"]:.1f}' if 'median_ms' in row else ''
    lines.append(f'| {row["bench"]} | {row["implementation"]} | {ms} | {other} |')
  return '\n'.join(lines)


def main() -> None:
  if _SUITE.value not in SUITES:
    hint = errors.did_you_mean(_SUITE.value, SUITES)
    raise errors.UserError(f'no suite {_SUITE.value!r}; there is {", ".join(SUITES)}{hint}')
  collected: dict[tuple[str, str], list[dict[str, Any]]] = {}
  workers = [(m, interpreter(torch)) for m, torch in SUITES[_SUITE.value]]
  for module, python in workers:
    if python is None:
      print(f'left out: {module}, no Python with torch was found', file=sys.stderr)
  jobs = [(m, p) for _ in range(_ROUNDS.value) for m, p in workers if p is not None]
  for module, python in tqdm.tqdm(jobs, desc='bench', file=sys.stderr):
    for row in run_worker(module, python):
      collected.setdefault((row['bench'], row['implementation']), []).append(row)
  rows = [merge(r) for r in collected.values()]
  print(f'Machine: {machine()}\n\n{table(rows)}')
  if _OUT.value:
    out = pathlib.Path(_OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({'machine': machine(), 'rows': rows}, indent=1))


if __name__ == '__main__':
  common.run(main)
