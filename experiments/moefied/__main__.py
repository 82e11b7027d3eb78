"""Splits one trained dense model by every pair of split and choice, and writes table and picture.

Each pair runs 10, 20, 30 and 50 % of the neurons, as they are and with output matrices fitted, on
the calibration of each seed; the loss is that of test texts. What is in --out already is not done
again, so it can be stopped and started. On two cores a run of a T5 of four layers 256x1024 takes
about ten seconds.

Example:
  python -m experiments.train --config configs/sotu_switch16.py --set model.family=t5 \
      --set model.moe=null --set train.steps=1200 --set train.batch_size=32 \
      --set optim.decay_steps=600 --workdir runs/t5
  python -m experiments.moefied --model runs/t5/model
"""

import pathlib
from typing import Any

from absl import flags
import tqdm

from configs import sotu_switch16
from experiments import flags as common
from experiments import pages
from experiments.fewer import problems
from experiments.moefied import page, pictures, runs
from moejax import files
from moejax.compress import compress

_MODEL = flags.DEFINE_string('model', 'runs/t5/model', 'Folder of the dense model to split.')
_TRAIN = flags.DEFINE_multi_string(
    'calibration', list(sotu_switch16.TRAIN), 'Text that splits and routers are fitted on.'
)
_TEST = flags.DEFINE_multi_string(
    'test', list(sotu_switch16.TEST), 'Text whose loss is measured. Can be repeated.'
)
_PAIRS = flags.DEFINE_list(
    'pairs', [f'{s}/{c}' for s in page.SPLITS for c in page.CHOICES], 'split/choice of each.'
)
_SHARES = flags.DEFINE_list('shares', ['0.1', '0.2', '0.3', '0.5'], 'Of the neurons that run.')
_FORMS = flags.DEFINE_list('forms', ['plain', 'fitted'], 'Of plain, fitted, filled.')
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Of the calibration and of what is random.')
_SIZE = flags.DEFINE_integer('expert_size', 32, 'Neurons of an expert.', lower_bound=1)
_SAMPLES = flags.DEFINE_integer('samples', 256, 'Calibration samples.', lower_bound=1)
_TESTS = flags.DEFINE_integer('test_samples', 128, 'Samples of --test.', lower_bound=1)
_OUT = flags.DEFINE_string('out', 'experiments/evidence/moefied.json', 'Where the figures go.')
_PAGE = flags.DEFINE_string('page', 'experiments/RESULTS_MOEFIED.md', 'Where the page goes.')


def main() -> None:
  folder = files.require_folder(_MODEL.value)
  out = pathlib.Path(_OUT.value)
  about = {
      'model': str(folder), 'expert_size': _SIZE.value, 'samples': _SAMPLES.value,
      'tests': _TESTS.value, 'calibration': list(_TRAIN.value), 'test': list(_TEST.value),
  }
  result = pages.opened(out, about, loss=None, runs={})
  left = runs.left(
      result['runs'], _PAIRS.value, _SHARES.value, _FORMS.value, _SEEDS.value
  )
  if left:
    go_on(folder, left, result, out)
  image = out.with_suffix('.png')
  files.write_whole(image, pictures.losses(result))
  page.write(pathlib.Path(_PAGE.value), result, image)


def go_on(
    folder: pathlib.Path, left: list[tuple[str, ...]], result: dict[str, Any], out: pathlib.Path
) -> None:
  """Does the runs that are left, and writes each as it is done."""
  problem = problems.of_texts(folder, _TRAIN.value, _TEST.value, _TESTS.value, 1)
  calibration: dict[int, Any] = {}
  for split, choice, share, form, seed in tqdm.tqdm(left, disable=None):
    number = int(seed)
    if number not in calibration:
      calibration = {number: problem.calibration(_SAMPLES.value, number)}
    step = runs.step_of(split, choice, float(share), form, number, _SIZE.value)
    report = compress(
        folder, step, calibration[number],
        validation_batches=problem.validation, sentinel=problem.sentinel,
    ).report
    rows, before = report['layers'], report['before']
    mean = lambda name: sum(row[name] for row in rows) / len(rows)
    result['loss'], result['active'] = before['loss'], mean('active_neurons')
    result['runs']['/'.join((split, choice, share, form, seed))] = {
        'loss': report['loss'], 'recall': round(mean('mass_recall'), 4),
        'error': round(mean('relative_output_error'), 4), 'run': round(mean('neurons_run'), 4),
        'flops': report['after']['flops_per_token'] / before['flops_per_token'],
        'seconds': round(sum(step['seconds'] for step in report['steps']), 1),
    }
    files.write_json(out, result)


if __name__ == '__main__':
  common.run(main, __doc__)
