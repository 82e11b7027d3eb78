r"""Compresses a model folder with calibration text, layer by layer; a killed run resumes.

Example:
  python -m experiments.compress --config configs/qmoe.py --model runs/sotu/model \
      --calibration 'experiments/data/sotu.tar.xz::sotu/19*.txt' --out runs/sotu/ternary
  python -m experiments.compress --config configs/qmoe.py:two_bit --set layers='decoder/.*' ...
  python -m experiments.compress --config configs/prune.py:reap --set experts=8 ...
  python -m experiments.compress --config configs/merge.py:hc_smoe --set ratio=0.25 ...
  python -m experiments.compress --config configs/cut.py --set sparsity=0.6 ...
  python -m experiments.compress --config configs/moefy.py --set share=0.3 ...

With --dry_run nothing is written or calibrated: a table and JSON say what the result will weigh.
  python -m experiments.compress --config configs/qmoe.py --model switch-c-2048 --dry_run
"""

import pathlib
import sys
from typing import Any
import warnings

from absl import flags

from experiments import flags as common
from moejax import account, errors, evaluate, files, presets, progress, store
from moejax import report as report_lib
from moejax.compress import base, driver, predict, profile, relufy, shares, stats
from moejax.data import text
from moejax.data import tokenizer as tokenizer_lib
from moejax.report import profile_png

common.define_config_flags()
_MODEL = flags.DEFINE_string('model', None, 'Model folder that moejax wrote.')
_CALIBRATION = flags.DEFINE_multi_string(
    'calibration', [], 'Text whose samples guide the compression. Can be repeated.'
)
_VALIDATION = flags.DEFINE_multi_string(
    'validation', [], 'Text that runs along for its loss only. Can be repeated.'
)
_DRY_RUN = flags.DEFINE_bool(
    'dry_run', False, 'Only tell the size: of a folder, or of a published model given by its name.'
)
_ZERO_SHARE = flags.DEFINE_float(
    'zero_share', None,
    'For --dry_run: share of ternary weights that will be zero. The default follows from the width '
    'of each matrix; for models that QMoE published it is what was found there.', lower_bound=0.0,
    upper_bound=1.0,
)
_STATISTICS = flags.DEFINE_string(
    'statistics', None,
    'File of the model\'s statistics, for merging and pruning: read if it is there, else measured '
    'on --calibration and written, so that several methods share one pass.'
)
_OUT = flags.DEFINE_string('out', None, 'Folder to write.')
_SAMPLE_LENGTH = flags.DEFINE_integer(
    'sample_length', 0, 'Tokens a sample; 0 takes what the model was trained with.', lower_bound=0
)
_SAMPLES = flags.DEFINE_integer('samples', 2048, 'Calibration samples.', lower_bound=1)
_VALIDATION_SAMPLES = flags.DEFINE_integer(
    'validation_samples', 128, 'Validation samples.', lower_bound=1
)


def batches(
    source: store.Source, tokenizer: tokenizer_lib.Tokenizer, patterns: list[str], flag: str,
    limit: int,
) -> list[dict[str, Any]]:
  """At most `limit` span-corrupted samples spread over the text."""
  data = evaluate.data_config(source.folder, sample_length=_SAMPLE_LENGTH.value)
  made = evaluate.fixed_batches(
      source.config, data, text.documents(patterns, flag), tokenizer, batch_size=1, name=flag
  )
  spread = evaluate.spread(made, limit)
  return list(progress.bar(spread, label=flag, total=min(limit, made.num_samples)))


def statistics(
    folder: pathlib.Path, step: base.Transform, calibration: list[dict[str, Any]], sentinel: int
) -> stats.Statistics | None:
  """What --statistics names, for the first step; None without it, or where it wants none."""
  if not _STATISTICS.value or not step.statistics():
    return None
  file = pathlib.Path(_STATISTICS.value)
  if file.exists():
    return stats.Statistics.load(file)
  files.require_writable(file)
  found = stats.measure(
      folder, calibration, step.statistics(), sentinel=sentinel,
      work=file.with_name(f'.{file.name}.measuring'), progress=True,
  )
  found.save(file)
  file.with_name(f'.{file.name}.measuring').unlink()
  return found


def dry_run(transform: base.Transform | base.Chain) -> None:
  """Prints what --model, a folder or the name of a published model, will weigh."""
  model: Any = str(_MODEL.value)
  zero_share = _ZERO_SHARE.value
  if not pathlib.Path(model).exists():
    if model not in presets.PRESETS:
      hint = errors.did_you_mean(model, presets.PRESETS)
      raise errors.UserError(f'{model} is no folder and no published model{hint}')
    if zero_share is None and model in account.QMOE_PUBLISHED:
      zero_share = account.QMOE_PUBLISHED[model][0]
    model = presets.preset(model)
  result = predict.dry_run(model, transform, zero_share=zero_share)
  result['zero_share'] = zero_share
  print(predict.table(result), file=sys.stderr, flush=True)
  print(files.json_text(result, indent=2))


def look(
    folder: pathlib.Path, settings: profile.Look, calibration: list[dict[str, Any]],
    validation: list[dict[str, Any]], sentinel: int,
) -> None:
  """Tells what a dense model's neurons do, and writes it to --out; no model is made."""
  out = pathlib.Path(str(_OUT.value))
  files.require_writable(out / 'profile.json')
  result = profile.profile(
      folder, calibration, validation, settings, sentinel=sentinel, progress=True
  )
  files.write_json(out / 'profile.json', result)
  files.write_whole(out / 'profile.png', profile_png.render(result))
  print(profile.table(result), file=sys.stderr, flush=True)
  print(files.json_text({
      'out': str(out), 'loss': result['loss'], 'expected': result['expected'],
      'active': {row['path']: round(row['active'], 4) for row in result['layers']},
  }, indent=2))


def cut(
    folder: pathlib.Path, how: relufy.Relufy, calibration: list[dict[str, Any]], sentinel: int
) -> None:
  """Writes the model with thresholds for its activations to --out."""
  files.require_target(str(_OUT.value))
  relufy.relufy(
      folder, how.kind, calibration, str(_OUT.value), sparsity=how.sparsity, shift=how.shift,
      sentinel=sentinel, progress=True,
  )
  print(files.json_text({
      'out': _OUT.value, **relufy.table(store.Source(str(_OUT.value)).config)
  }, indent=2))


def allocate(
    folder: pathlib.Path, how: shares.Shares, calibration: list[dict[str, Any]], sentinel: int
) -> None:
  """Writes the split model with a number of experts for each layer to --out."""
  files.require_target(str(_OUT.value))
  _, report = shares.search_shares(
      folder, calibration, how, str(_OUT.value), sentinel=sentinel, progress=True
  )
  print(files.json_text({'out': _OUT.value, **report}, indent=2))


# Settings that are no compression of weights, and what runs them.
OTHERS: Any = {relufy.Relufy: cut, shares.Shares: allocate}


def main() -> None:
  common.require('config', 'model')
  transform: Any = common.load_config(flags.FLAGS.config, flags.FLAGS.set)
  known: Any = (base.Transform, base.Chain, profile.Look, *OTHERS)
  if not isinstance(transform, known):
    raise errors.UserError(f'{flags.FLAGS.config} holds no compression; try configs/qmoe.py')
  if _DRY_RUN.value:
    if isinstance(transform, (profile.Look, *OTHERS)):
      raise errors.UserError('--dry_run is for what changes the size of a model')
    dry_run(transform)
    return
  common.require('out')
  if not _CALIBRATION.value:
    raise errors.UserError('--calibration is missing; see --help')
  folder = files.require_folder(str(_MODEL.value))
  source = store.Source(folder, verify=True)
  tokenizer = tokenizer_lib.load(str(folder))
  calibration = batches(source, tokenizer, _CALIBRATION.value, '--calibration', _SAMPLES.value)
  validation = [] if not _VALIDATION.value else batches(
      source, tokenizer, _VALIDATION.value, '--validation', _VALIDATION_SAMPLES.value
  )
  if isinstance(transform, profile.Look):
    look(folder, transform, calibration, validation, tokenizer.first_sentinel)
    return
  if type(transform) in OTHERS:
    OTHERS[type(transform)](folder, transform, calibration, tokenizer.first_sentinel)
    return
  first = transform.steps[0] if isinstance(transform, base.Chain) else transform
  warnings.simplefilter('ignore', UserWarning)  # They are in the report, and told below.
  result = driver.compress(
      folder, transform, calibration, _OUT.value, validation_batches=validation,
      sentinel=tokenizer.first_sentinel, progress=True,
      statistics=statistics(folder, first, calibration, tokenizer.first_sentinel),
  )
  report = result.report
  page = report_lib.write(report, str(_OUT.value))
  summary = {
      'out': _OUT.value, 'page': str(page),
      'loss': report['loss'],
      'before': report['before'], 'after': report['after'],
      'seconds': round(sum(step['seconds'] for step in report['steps']), 1),
      'matrices': len(report['layers']),
      'rounded_instead': sum(bool(row.get('fallback')) for row in report['layers']),
  }
  if report['over_budget']:
    print(
        f'warning: {", ".join(report["over_budget"])}: more than target_bits, the fewest that its '
        'grids can take; raise search.target_bits', file=sys.stderr, flush=True,
    )
  for line in report['warnings']:
    print(f'warning: {line}', file=sys.stderr, flush=True)
  print(files.json_text(summary, indent=2))


if __name__ == '__main__':
  common.run(main, __doc__)
