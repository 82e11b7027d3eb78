"""Compiles every planned run for its TPU slice and writes what a chip needs: JSON and a table.

Takes minutes and several GB of memory a run; runs that are in --out already are not compiled again.

Example:
  python -m experiments.pods --out experiments/evidence/pods
"""

import pathlib
import sys
from typing import Any

from absl import flags
import tqdm

from experiments import flags as common
from experiments import tpu_compiler
from experiments.pods import plans, table
from moejax import files

FLAGS = flags.FLAGS


def compile_plan(plan: plans.Plan) -> dict[str, Any]:
  """Compiles one in a process of its own.

  Raises:
    UserError: it failed, with its last line.
  """
  return tpu_compiler.run(
      'experiments.pods.compile_step', '--config', f'configs/{plan.config}.py:{plan.variant}',
      '--slice', plan.slice, name=plan.name,
  )


def main() -> None:
  out = pathlib.Path(FLAGS.out)
  data, page = out.with_suffix('.json'), out.with_suffix('.md')
  for written in (data, page):
    files.require_writable(written)
  results = files.read_json(data) if data.is_file() else {}
  todo = [p for p in plans.PLANS if p.name not in results and FLAGS.only in p.name]
  for plan in tqdm.tqdm(todo, file=sys.stderr):
    results[plan.name] = compile_plan(plan)
    files.write_json(data, results)
    files.write_whole(page, table.markdown(results))
  print(table.markdown(results))


def define_flags() -> None:
  """Defines --out and --only."""
  flags.DEFINE_string('out', 'runs/pods', 'Writes OUT.json and OUT.md.')
  flags.DEFINE_string('only', '', 'Only runs with this in their name.')


if __name__ == '__main__':
  define_flags()
  common.run(main)
