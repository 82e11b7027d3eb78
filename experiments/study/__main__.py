"""Times the study's models, trains what it still lacks, and writes its page and pictures.

The variants are timed in turn, a few steps each, before the first long run: give it a machine that
does nothing else until then. Training takes hours on two cores; what is in --out already is not
done again, so it can be stopped and started. The mix wants `experiments.study.texts` first.

Example:
  python -m experiments.study --corpus speeches --seeds 0,1,2
"""

from collections.abc import Sequence
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from absl import flags
import jax
import tqdm

from experiments import flags as common
from experiments import pages
from experiments.bench import suites
from experiments.study import page, records
from moejax import errors, files

FLAGS = flags.FLAGS
ROOT = pathlib.Path(__file__).parents[2]
TIMED_STEPS = 16


def train(name: str, workdir: pathlib.Path, changes: Sequence[str]) -> dict[str, Any]:
  """Trains corpus/variant/seed with fields changed as --set does; returns its record.

  Raises:
    UserError: training failed, with its last line.
  """
  corpus, variant, seed = name.split('/')
  changes = [f'train.seed={seed}', f'data.seed={seed}', *changes]
  done = subprocess.run(
      [sys.executable, '-m', 'experiments.train',
       '--config', f'configs/grin_tiny.py:{variant}-{corpus}', '--workdir', str(workdir),
       *(f'--set={change}' for change in changes)],
      cwd=ROOT, capture_output=True, text=True, check=False,
  )
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ['no message'])[-1]
    raise errors.UserError(f'{name}: {last}')
  return records.of_run(workdir)


def speeds(changes: Sequence[str]) -> dict[str, float]:
  """Tokens a second of every variant: medians of a few steps, one variant after the other."""
  short = [f'train.steps={TIMED_STEPS}', 'train.log_every=1', 'train.checkpoint_every=0',
           'optim.warmup_steps=1', 'optim.decay_steps=1', 'data.valid_files=[]', *changes]
  found = {}
  for variant in page.LABELS:
    with tempfile.TemporaryDirectory() as folder:
      run = train(f'speeches/{variant}/0', pathlib.Path(folder), short)
    found[variant] = run['tokens_per_second']
  return found


def write(result: dict[str, Any]) -> None:
  """The JSON of all runs, a picture a corpus, and the page with what was written by hand."""
  files.write_json(f'{FLAGS.out}.json', result)
  for corpus in page.CORPORA:
    if records.by_variant(result['runs'], corpus):
      files.write_whole(f'{FLAGS.out}_{corpus}.png', page.draw(result, corpus))
  pages.write(pathlib.Path(FLAGS.page), page.markdown(result))


def main() -> None:
  path = pathlib.Path(f'{FLAGS.out}.json')
  for written in (path, FLAGS.page, *(f'{FLAGS.out}_{corpus}.png' for corpus in page.CORPORA)):
    files.require_writable(written)
  result: dict[str, Any] = files.read_json(path) if path.is_file() else {
      'machine': suites.machine(), 'jax': jax.__version__, 'speeds': [], 'runs': {}
  }
  for _ in range(len(result['speeds']), FLAGS.rounds):
    result['speeds'].append(speeds(FLAGS.set))
    write(result)
  names = [
      f'{corpus}/{variant}/{seed}' for corpus in FLAGS.corpus or page.CORPORA
      for seed in FLAGS.seeds for variant in page.LABELS
  ]
  todo = [name for name in names if name not in result['runs']]
  for name in tqdm.tqdm(todo, file=sys.stderr):
    result['runs'][name] = train(name, pathlib.Path(FLAGS.workdir) / name, FLAGS.set)
    write(result)
  write(result)
  print(page.markdown(result))


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_multi_enum('corpus', [], sorted(page.CORPORA), 'Default: all.')
  flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of parameters and order.')
  flags.DEFINE_integer('rounds', 3, 'Times every variant so often.', lower_bound=1)
  flags.DEFINE_string('out', 'experiments/evidence/study', 'Writes OUT.json, OUT_CORPUS.png.')
  flags.DEFINE_string('page', 'experiments/RESULTS.md', 'The page.')
  flags.DEFINE_string('workdir', 'runs/study', 'Folder of the runs.')
  flags.DEFINE_multi_string('set', [], 'Passed to experiments.train.')


if __name__ == '__main__':
  define_flags()
  common.run(main)
