"""Cuts one trained model to fewer experts by every method, and writes tables and pictures.

One shot, and with --recover after a short training held to the model before. Every method sees the
same calibration of a seed, and where it wants statistics the same ones. What is in --out already is
not done again, so it can be stopped and started; twelve methods, three sizes and three seeds take a
quarter of an hour on two cores, and with --recover 64 an hour more.

Example:
  python -m experiments.fewer --model experiments/checkpoints/sotu-switch-16 --recover 64
"""

from collections.abc import Mapping
import pathlib
import tempfile
from typing import Any

from absl import flags
import jax
import numpy as np
import tqdm

from configs import sotu_switch16
from experiments import flags as common
from experiments.bench import suites
from experiments.fewer import page, pictures, recovery
from moejax import errors, evaluate, files, store
from moejax.compress import compress, fewer, grouping_core, stats
from moejax.data import text
from moejax.data import tokenizer as tokenizer_lib

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
_OUT = flags.DEFINE_string('out', 'experiments/evidence/fewer.json', 'Where the figures go.')
_PAGE = flags.DEFINE_string('page', 'experiments/RESULTS_FEWER.md', 'Where the page goes.')


def samples(folder: pathlib.Path, patterns: list[str], flag: str) -> Any:
  """All samples of a text, one a batch."""
  tokenizer = tokenizer_lib.load(str(folder))
  return evaluate.fixed_batches(
      store.Source(folder).config, evaluate.data_config(folder), text.documents(patterns, flag),
      tokenizer, batch_size=1, name=flag,
  )


def some(batches: Any, count: int, seed: int, seeds: int) -> list[dict[str, Any]]:
  """`count` samples spread over the text, other ones for each seed."""
  total = batches.num_batches
  count = min(count, total // max(seeds, 1))
  return [batches.batch((i * total // count + seed * total // (count * seeds)) % total)
          for i in range(count)]


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
  result: dict[str, Any] = files.read_json(out) if out.exists() else {
      'machine': suites.machine(), 'jax': jax.__version__, 'model': str(folder),
      'samples': _SAMPLES.value, 'before': {}, 'runs': {},
  }
  keys = [(m, int(n), int(s)) for s in _SEEDS.value for n in _COUNTS.value
          for m in _METHODS.value]
  wanted = 'recovered' if _RECOVER.value else 'loss'
  left = [key for key in keys if wanted not in result['runs'].get('{}/{}/{}'.format(*key), {})]
  recover = None
  if _RECOVER.value and left:
    how = {'steps': _RECOVER.value, 'batch': _BATCH.value}
    if result.setdefault('recovery', how) != how:
      raise errors.UserError(
          f'{out} holds runs of --recover {result["recovery"]["steps"]} --batch '
          f'{result["recovery"]["batch"]}: name another --out'
      )
    recover = recovery.Recovery(folder, _TRAIN.value, **how)
  train, test = (samples(folder, flag.value, f'--{name}')
                 for name, flag in (('calibration', _TRAIN), ('test', _TEST)))
  validation = list(evaluate.spread(test, _TESTS.value))
  sentinel = tokenizer_lib.load(str(folder)).first_sentinel
  held: dict[int, tuple[list[dict[str, Any]], stats.Statistics]] = {}
  for method, count, seed in tqdm.tqdm(left, disable=None):
    if seed not in held:
      calibration = some(train, _SAMPLES.value, seed, len(_SEEDS.value))
      kinds = ('routing', 'outputs', 'all_outputs')
      held = {seed: (calibration, stats.measure(folder, calibration, kinds, sentinel=sentinel))}
      result.setdefault('trees', trees(held[seed][1]))
      result['experts'] = fewer.experts_held(store.Source(folder).config)
    calibration, statistics = held[seed]
    step = page.METHODS[method](count, seed)
    with tempfile.TemporaryDirectory(prefix='fewer_') as work:
      cut = pathlib.Path(work) / 'cut'
      report = compress(
          folder, step, calibration, cut if recover else None, validation_batches=validation,
          sentinel=sentinel, statistics=statistics if step.statistics() else None,
      ).report
      run = record(report)
      if recover is not None:
        run['recovered'] = recover(cut, validation, seed)['after']
    result['before'] = {
        name: report['before'][name] for name in ('loss', 'expert_bytes', 'stored_bytes')
    }
    result['runs'][f'{method}/{count}/{seed}'] = run
    files.write_json(out, result)
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


def trees(statistics: stats.Statistics) -> dict[str, Any]:
  """HC-SMoE's tree of each layer."""
  found = {}
  for path, sums in statistics.layers.items():
    mean = sums['output_all'] / np.maximum(sums['tokens_all'], 1)[:, None]
    found[path] = grouping_core.linkage(mean).round(6).tolist()
  return found


if __name__ == '__main__':
  common.run(main, __doc__)
