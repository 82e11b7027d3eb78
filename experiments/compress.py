"""Compresses a model folder with calibration text, layer by layer; a killed run resumes.

Example:
  python -m experiments.compress --config configs/qmoe.py --model runs/sotu/model \
      --calibration 'experiments/data/sotu.tar.xz::sotu/19*.txt' --out runs/sotu/ternary
  python -m experiments.compress --config configs/qmoe.py:two_bit --set layers='decoder/.*' ...
"""

import json
import sys
from typing import Any

from absl import flags
import tqdm

from experiments import flags as common
from moejax import evaluate, files, store
from moejax.compress import base, driver
from moejax.data import text
from moejax.data import tokenizer as tokenizer_lib
from moejax.errors import UserError

common.define_config_flags()
_MODEL = flags.DEFINE_string('model', None, 'Model folder that moejax wrote.')
_CALIBRATION = flags.DEFINE_multi_string(
    'calibration', [], 'Text whose samples guide the compression. Can be repeated.'
)
_VALIDATION = flags.DEFINE_multi_string(
    'validation', [], 'Text that runs along for its loss only. Can be repeated.'
)
_OUT = flags.DEFINE_string('out', None, 'Folder to write.')
_SAMPLES = flags.DEFINE_integer('samples', 2048, 'Calibration samples.', lower_bound=1)
_VALIDATION_SAMPLES = flags.DEFINE_integer(
    'validation_samples', 128, 'Validation samples.', lower_bound=1
)


def batches(
    source: store.Source, tokenizer: tokenizer_lib.Tokenizer, patterns: list[str], flag: str,
    limit: int,
) -> list[dict[str, Any]]:
  """At most `limit` span-corrupted samples spread over the text."""
  made = evaluate.fixed_batches(
      source.config, evaluate.data_config(str(source.folder)), text.documents(patterns, flag),
      tokenizer, batch_size=1, name=flag,
  )
  count = min(limit, made.num_samples)
  show = tqdm.tqdm(range(count), desc=flag, disable=not sys.stderr.isatty())
  return [made.batch(i * made.num_samples // count) for i in show]


def main() -> None:
  common.require('config', 'model', 'out')
  values = flags.FLAGS
  if not _CALIBRATION.value:
    raise UserError('--calibration is missing; see --help')
  transform: Any = common.load_config(values.config, values.set)
  if not isinstance(transform, base.Transform | base.Chain):
    raise UserError(f'{values.config} holds no compression; try configs/qmoe.py')
  folder = files.require_folder(str(_MODEL.value))
  source = store.Source(folder, verify=True)
  tokenizer = tokenizer_lib.load(str(folder))
  calibration = batches(source, tokenizer, _CALIBRATION.value, '--calibration', _SAMPLES.value)
  validation = [] if not _VALIDATION.value else batches(
      source, tokenizer, _VALIDATION.value, '--validation', _VALIDATION_SAMPLES.value
  )
  result = driver.compress(
      folder, transform, calibration, _OUT.value, validation_batches=validation,
      sentinel=source.config.vocab_size - tokenizer.num_sentinels, progress=sys.stderr.isatty(),
  )
  report = result.report
  summary = {
      'out': _OUT.value, 'loss': report['loss'],
      'before': report['before'], 'after': report['after'],
      'seconds': round(sum(step['seconds'] for step in report['steps']), 1),
      'matrices': len(report['layers']),
      'rounded_instead': sum(bool(row.get('fallback')) for row in report['layers']),
  }
  print(json.dumps(summary, indent=2))


if __name__ == '__main__':
  common.run(main, __doc__)
