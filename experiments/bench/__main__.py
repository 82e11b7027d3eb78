"""Measures moejax and its peers on this machine, each in a process of its own.

Example:
  python -m experiments.bench --suite foundation --out runs/bench.json

Every worker is held to the same two cores. Ours runs in the newest JAX and PyTorch peers in the
newest torch found: in this Python, .venv, .venv-new and those given by --python. Rounds go over all
peers in turn, each with its own warm-up. A peer without an interpreter is left out and said so.
"""

from collections.abc import Sequence
import pathlib
import sys
import tempfile
from typing import Any

from absl import flags
import tqdm

from experiments import flags as common
from experiments.bench import suites, tables
from moejax import errors, files

_SUITE = flags.DEFINE_string('suite', 'foundation', 'Which suite to run.')
_OUT = flags.DEFINE_string('out', None, 'Also write everything to this JSON file.')
_MARKDOWN = flags.DEFINE_string(
    'markdown', None, 'Also write the tables here; what stands below the marker line is kept.'
)
_RENDER = flags.DEFINE_string('render', None, 'Measure nothing, show this JSON file of --out.')
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Rounds over all workers.', lower_bound=1)
_QUICK = flags.DEFINE_bool('quick', False, 'Tiny sizes: shows that everything runs.')
_PYTHON = flags.DEFINE_multi_string('python', [], 'One more interpreter to look in.')


def measure(suite: str, rounds: int, quick: bool, pythons: Sequence[str]) -> dict[str, Any]:
  """Runs a suite; returns machine, settings, workers, skipped parts, measurements, comparisons."""
  found = suites.interpreters(pythons)
  skipped: dict[str, str] = {}
  pythons_of = {}
  for worker in suites.SUITES[suite]:
    python, why = suites.choose(worker, found)
    if python is None:
      skipped[worker.part] = f'{worker.module}: {why}'
      print(f'left out: {skipped[worker.part]}', file=sys.stderr)
    else:
      pythons_of[worker] = python
  jobs = [(r, w) for r in range(rounds) for w in pythons_of]
  machine, cpus = suites.machine(), suites.pin()
  rows: list[tuple[str, dict[str, Any]]] = []
  workers: dict[str, dict[str, Any]] = {}
  bar = tqdm.tqdm(
      total=sum(w.seconds for _, w in jobs), file=sys.stderr,
      bar_format='{desc} {percentage:3.0f}% |{bar:20}| {elapsed}, {remaining} left',
  )
  for r, worker in jobs:
    bar.set_description(f'{worker.module}, round {r + 1} of {rounds}')
    if not workers.get(worker.module, {}).get('failed'):
      result, why = suites.run_worker(worker, pythons_of[worker], quick)
      if result is None:
        skipped[worker.part] = why
        workers[worker.module] = {'versions': {}, 'failed': why}
      else:
        rows += [(worker.part, row) for row in result.pop('rows')]
        workers[worker.module] = result
    bar.update(worker.seconds)
  bar.close()
  measurements = tables.merge(rows)
  settings = {
      'rounds': rounds, 'quick': quick, 'threads': suites.THREADS, 'cpus': cpus,
      'environment': suites.environment(quick),
  }
  return {
      'suite': suite, 'machine': machine, 'settings': settings, 'workers': workers,
      'skipped': skipped, 'measurements': measurements,
      'comparisons': tables.compare(measurements, skipped),
  }


def prepare(path: pathlib.Path) -> None:
  """Finds out before a long run whether a file can be written."""
  if path.is_dir():
    raise errors.UserError(f'{path} is a folder: name a file')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
      pass
  except OSError as error:
    raise files.os_error(path, error) from error


def main() -> None:
  suite = _SUITE.value
  if suite not in suites.SUITES:
    hint = errors.did_you_mean(suite, suites.SUITES) or f'; there is {", ".join(suites.SUITES)}'
    raise errors.UserError(f'no suite {suite!r}{hint}')
  out, page = (pathlib.Path(f) if f else None for f in (_OUT.value, _MARKDOWN.value))
  for path in filter(None, (out, page)):
    prepare(path)
  rest = tables.by_hand(page) if page else ''
  if _RENDER.value:
    result = files.read_json(pathlib.Path(_RENDER.value))
    if 'comparisons' not in result:
      raise errors.UserError(f'{_RENDER.value} was not written by --out of this command')
  else:
    result = measure(suite, _ROUNDS.value, _QUICK.value, _PYTHON.value)
  print(tables.text(result), flush=True)
  if out:
    files.write_json(out, result)
  if page:
    page.write_text(tables.markdown(result, f'python -m experiments.bench --suite {suite}') + rest)
  failed = [w['failed'] for w in result['workers'].values() if w.get('failed')]
  if failed:
    raise errors.UserError('; '.join(failed))


if __name__ == '__main__':
  common.run(main)
