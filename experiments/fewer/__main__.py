"""Cuts one trained model to fewer experts by every method, and writes tables and pictures.

One shot, and with --recover after a short training held to the model before. Every method sees the
same calibration of a seed, and where it wants statistics the same ones. What is in --out already is
not done again, so it can be stopped and started. On two cores a run takes about six seconds, ZipIt
over a minute, and --recover 64 adds about twenty seconds to each. With --task, a folder of texts
for each label, the model is first fine-tuned to label them, and accuracy is measured too.

Example:
  python -m experiments.fewer --model experiments/checkpoints/sotu-switch-16 --recover 64
"""

from collections.abc import Mapping
import functools
import pathlib
import tempfile
from typing import Any

from absl import flags
import numpy as np
import tqdm

from configs import sotu_switch16
from experiments import flags as common
from experiments import pages
from experiments.fewer import page, pictures, problems, training
from moejax import errors, files, store
from moejax.compress import compress, fewer, grouping_core, stats

_MODEL = flags.DEFINE_string(
    'model', 'experiments/checkpoints/sotu-switch-16', 'Model folder to cut.'
)
_TRAIN = flags.DEFINE_multi_string(
    'calibration', list(sotu_switch16.TRAIN), 'Text that guides the methods. Can be repeated.'
)
_TEST = flags.DEFINE_multi_string(
    'test', list(sotu_switch16.TEST), 'Text whose loss is measured. Can be repeated.'
)
_METHODS = flags.DEFINE_list('methods', sorted(page.METHODS), 'Which methods.')
_COUNTS = flags.DEFINE_list('counts', ['12', '8', '4'], 'Experts that a layer keeps.')
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Of the calibration and of what is random.')
_SAMPLES = flags.DEFINE_integer('samples', 256, 'Calibration samples.', lower_bound=1)
_TESTS = flags.DEFINE_integer('test_samples', 128, 'Samples of --test.', lower_bound=1)
_RECOVER = flags.DEFINE_integer('recover', 0, 'Steps of training after; 0: none.', lower_bound=0)
_BATCH = flags.DEFINE_integer('batch', 8, 'Samples a step of --recover.', lower_bound=1)
_RATE = flags.DEFINE_float('learning_rate', 1e-4, 'Of --recover.', lower_bound=0)
_TASK = flags.DEFINE_string('task', '', 'Folder with a folder of .txt for each label.')
_TUNED = flags.DEFINE_string('tuned', 'runs/fewer/tuned', 'Where the model of --task stays.')
_TASK_STEPS = flags.DEFINE_integer('task_steps', 300, 'Of fine-tuning.', lower_bound=1)
_OUT = flags.DEFINE_string('out', 'experiments/evidence/fewer.json', 'Where the figures go.')
_PAGE = flags.DEFINE_string('page', 'experiments/RESULTS_FEWER.md', 'Where the page goes.')


def record(report: Mapping[str, Any]) -> dict[str, Any]:
  """What of a report is kept."""
  after, names = report['after'], ('path', 'expert', 'members', 'kept')
  return {
      'loss': report['loss'], 'expert_bytes': after['expert_bytes'],
      'stored_bytes': after['stored_bytes'],
      'seconds': round(sum(step['seconds'] for step in report['steps']), 1),
      'layers': [{k: row[k] for k in names if k in row} for row in report['layers']],
  }


def main() -> None:
  folder = files.require_folder(_MODEL.value)
  for name in _METHODS.value:
    if name not in page.METHODS:
      raise errors.UserError(
          f'--methods {name}: one of {sorted(page.METHODS)}'
          f'{errors.did_you_mean(name, page.METHODS)}'
      )
  out = pathlib.Path(_OUT.value)
  how = {
      'steps': _RECOVER.value, 'size': _BATCH.value, 'learning_rate': _RATE.value,
      'task': _TASK.value and pathlib.Path(_TASK.value).name,
  }
  about = {
      'model': str(folder), 'samples': _SAMPLES.value, 'tests': _TESTS.value,
      'calibration': list(_TRAIN.value), 'test': list(_TEST.value),
  }
  result = pages.opened(out, about, how=how, before={}, runs={})
  held = result['how']
  if held['task'] != how['task'] or (held['steps'] and how['steps'] and held != how):
    raise errors.UserError(f'{out} holds runs with other settings, {held}: see --out')
  if how['steps']:
    result['how'] = how
  keys = [(m, int(n), int(s)) for s in _SEEDS.value for n in _COUNTS.value
          for m in _METHODS.value]
  wanted = 'recovered' if how['steps'] else 'loss'
  left = [key for key in keys if wanted not in result['runs'].get('{}/{}/{}'.format(*key), {})]
  if left:
    go_on(folder, left, result, out, how)
  if not result['runs']:
    raise errors.UserError('nothing to show: give at least one method, count and seed')
  images = []
  for name, image in (
      ('', pictures.losses(result)), ('_map', pictures.layer_map(result)),
      ('_trees', pictures.trees(result)),
  ):
    if image is not None:
      images.append(out.with_name(f'{out.stem}{name}.png'))
      files.write_whole(images[-1], image)
  page.write(pathlib.Path(_PAGE.value), result, images)


def problem_of(folder: pathlib.Path, before: dict[str, Any]) -> problems.Problem:
  """What the flags ask for; a task's accuracy goes into `before`."""
  if not _TASK.value:
    return problems.of_texts(folder, _TRAIN.value, _TEST.value, _TESTS.value, _BATCH.value)
  problem, found = problems.of_labels(
      folder, pathlib.Path(_TASK.value), pathlib.Path(_TUNED.value), _TASK_STEPS.value,
      _BATCH.value,
  )
  before['accuracy'] = found['accuracy']
  return problem


def batch_of(problem: problems.Problem, start: int, i: int) -> dict[str, Any]:
  return problem.batches(start + i)


def go_on(
    folder: pathlib.Path, left: list[tuple[str, int, int]], result: dict[str, Any],
    out: pathlib.Path, how: dict[str, Any],
) -> None:
  """Does the runs that are left, and writes each as it is done."""
  problem = problem_of(folder, result['before'])
  held: dict[int, tuple[list[dict[str, Any]], stats.Statistics]] = {}
  trainer = None
  if how['steps'] or how['task']:
    trainer = training.Training(
        problem.folder, how['steps'], how['size'], how['learning_rate']
    )
  for method, count, seed in tqdm.tqdm(left, disable=None):
    if seed not in held:
      calibration = problem.calibration(_SAMPLES.value, seed)
      held = {seed: (calibration, stats.measure(
          problem.folder, calibration, ('routing', 'outputs', 'all_outputs'),
          sentinel=problem.sentinel,
      ))}
      result.setdefault('trees', trees(held[seed][1]))
      result['experts'] = fewer.experts_held(store.Source(folder).config)
    calibration, statistics = held[seed]
    step = page.METHODS[method](count, seed)
    with tempfile.TemporaryDirectory(prefix='fewer_') as work:
      cut = pathlib.Path(work) / 'cut'
      report = compress(
          problem.folder, step, calibration, cut if trainer else None,
          validation_batches=problem.validation, sentinel=problem.sentinel,
          statistics=statistics if step.statistics() else None,
      ).report
      run = record(report)
      if how['task'] and trainer:
        found = trainer(cut, problem.batches, problem.validation, train=False)
        run['accuracy'] = found['accuracy']
      if how['steps'] and trainer:
        batches = functools.partial(batch_of, problem, seed * how['steps'])
        found = trainer(cut, batches, problem.validation)
        run['recovered'] = found['loss']
        if how['task']:
          run['recovered_accuracy'] = found['accuracy']
    result['before'] |= {
        name: report['before'][name] for name in ('loss', 'expert_bytes', 'stored_bytes')
    }
    result['runs'][f'{method}/{count}/{seed}'] = run
    files.write_json(out, result)


def trees(statistics: stats.Statistics) -> dict[str, Any]:
  """HC-SMoE's tree of each layer."""
  found = {}
  for path, sums in statistics.layers.items():
    mean = sums['output_all'] / np.maximum(sums['tokens_all'], 1)[:, None]
    found[path] = grouping_core.linkage(mean).round(6).tolist()
  return found


if __name__ == '__main__':
  common.run(main, __doc__)
