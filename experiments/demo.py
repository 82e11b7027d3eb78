"""The main job: train a small Switch Transformer a little more, compress it in five ways, compare.

Continues the shipped checkpoint for two minutes on the State of the Union speeches, compresses its
experts, reloads every result in a fresh process, measures it on the test years, prints a table and
writes report.html and report.png. Steps are kept in the workdir; a killed run goes on where it was.

Example:
  python -m experiments.demo --workdir runs/demo
"""

from collections.abc import Mapping
import os
import pathlib
import platform
import sys
import time
from typing import Any

from absl import flags

from experiments import demo_steps as steps
from experiments import flags as common
from moejax import account, evaluate, files, report, store
from moejax import config as config_lib
from moejax.data import tokenizer as tokenizer_lib
from moejax.errors import UserError
from moejax.report import charts

_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', 'experiments/checkpoints/sotu-switch-16', 'Model folder to start from.'
)
_WORKDIR = flags.DEFINE_string('workdir', 'runs/demo', 'Folder for everything the demo makes.')
_TRAIN_SECONDS = flags.DEFINE_float(
    'train_seconds', 120.0, 'Seconds of live training.', lower_bound=0.0
)
_CALIBRATION = flags.DEFINE_integer(
    'calibration_samples', 2048, 'Samples of the training years that guide the compression.',
    lower_bound=1,
)
_TEST_BATCHES = flags.DEFINE_integer(
    'test_batches', 40, 'Batches of 32 samples of the test years, spread over them; 0 takes all.',
    lower_bound=0,
)
_ROWS = flags.DEFINE_list(
    'rows', [], 'Only these rows of the table beside the uncompressed model: rtn, qmoe, refit, '
    'search, two_bit.'
)
_TRAIN_FILES = flags.DEFINE_multi_string('train_files', [], 'Other text to train and calibrate on.')
_TEST_FILES = flags.DEFINE_multi_string('test_files', [], 'Other text to measure on.')


class Steps:
  """Numbers the steps, says what each does and how long it took."""

  def __init__(self, total: int, memory: steps.Memory):
    self._total, self._memory, self._done = total, memory, 0

  def __call__(self, title: str, name: str, inputs: Mapping[str, Any], made, work):
    self._done += 1
    print(f'[{self._done}/{self._total}] {title}', file=sys.stderr, flush=True)
    start = time.monotonic()
    result, kept = self._memory.step(name, inputs, made, work)
    said = 'kept from last time' if kept else f'{time.monotonic() - start:.0f} s'
    print(f'       {said}', file=sys.stderr, flush=True)
    return result


def settings_from_flags() -> steps.Settings:
  """Absolute paths, since the measuring processes run in the repository's root."""
  base = pathlib.Path.cwd()
  checkpoint = base / os.path.expanduser(_CHECKPOINT.value)
  if not checkpoint.exists() and (steps.ROOT / _CHECKPOINT.value).exists():
    checkpoint = steps.ROOT / _CHECKPOINT.value
  if not store.is_folder(checkpoint):
    raise UserError(f'no model folder at {checkpoint}: give one with --checkpoint')
  default = steps.Settings(checkpoint=checkpoint, workdir=base / _WORKDIR.value)

  def absolute(given, shipped):
    sources = tuple(given) or shipped
    start = base if given else steps.ROOT
    return tuple(str(start / os.path.expanduser(source)) for source in sources)

  return steps.Settings(
      checkpoint=checkpoint, workdir=default.workdir,
      train_files=absolute(_TRAIN_FILES.value, default.train_files),
      test_files=absolute(_TEST_FILES.value, default.test_files),
      train_seconds=_TRAIN_SECONDS.value, calibration_samples=_CALIBRATION.value,
      test_batches=_TEST_BATCHES.value, rows=tuple(_ROWS.value),
  )


def run(settings: steps.Settings) -> dict[str, Any]:
  """Every step; returns the report.json object."""
  recipes = steps.recipes(settings.rows)
  step = Steps(2 * len(recipes) + 1, steps.Memory(settings.workdir / 'steps'))
  trained = settings.workdir / 'train' / 'model'
  train_text, test_text = map(steps.text_fingerprint, (settings.train_files, settings.test_files))

  def measure(title, name, folder, against=None, baselines=False):
    inputs = {
        'model': steps.fingerprint(folder), 'text': test_text, 'batches': settings.test_batches,
        'against': against and steps.fingerprint(against),
        'baselines': train_text if baselines else None,
    }
    return step(title, f'evaluate_{name}', inputs, None, lambda: steps.evaluate_fresh(
        settings, folder, against, baselines=baselines))

  first = measure('Measure the checkpoint on the test years', 'checkpoint', settings.checkpoint)
  experiment = config_lib.to_json(steps.experiment_of(settings))
  training = step(
      f'Train {settings.train_seconds:.0f} seconds more', 'train',
      {'checkpoint': steps.fingerprint(settings.checkpoint), 'experiment': experiment,
       'text': train_text, 'seconds': settings.train_seconds},
      trained / store.MANIFEST, lambda: steps.train(settings),
  )
  training['content_loss_before'] = first['content_loss']
  sentinel = tokenizer_lib.load(trained).first_sentinel
  batches: list[dict[str, Any]] = []
  variants = []
  for recipe in recipes:
    folder = trained
    made: dict[str, Any] = {'steps': [], 'layers': []}
    if recipe.transform is not None:
      folder = settings.workdir / 'models' / recipe.key

      def work(recipe=recipe, folder=folder):
        if not batches:
          batches.extend(steps.calibration(settings, trained))
        return steps.compress(recipe, trained, folder, batches, sentinel)

      made = step(
          f'Compress: {recipe.name}', f'compress_{recipe.key}',
          {'model': steps.fingerprint(trained), 'settings': recipe.transform.describe(),
           'text': train_text, 'samples': settings.calibration_samples},
          folder / store.MANIFEST, work,
      )
    measured = measure(
        f'Reload and measure: {recipe.name}', recipe.key, folder,
        None if recipe.transform is None else trained, recipe.transform is None,
    )
    after = account.of_source(store.Source(folder))
    variants.append({
        'key': recipe.key, 'name': recipe.name, 'note': recipe.note, **made,
        'after': {**after, 'loss': measured['content_loss']}, 'evaluation': measured,
    })
  return comparison(settings, variants, training)


def headline_of(variants: list[dict[str, Any]]) -> dict[str, Any]:
  """The row that the report is about; the last one where that was not asked for."""
  return next((v for v in variants if v['key'] == steps.HEADLINE), variants[-1])


def comparison(
    settings: steps.Settings, variants: list[dict[str, Any]], training: dict[str, Any]
) -> dict[str, Any]:
  """The report.json object of all rows; the top level is that of the headline row."""
  base = variants[0]
  head = headline_of(variants)
  measured = base['evaluation']
  config = store.Source(settings.checkpoint).config
  data = evaluate.data_config(settings.checkpoint)
  baselines = {'bigram_content_loss': measured['bigram_content_loss']}
  if 'zeroed_experts' in measured:
    baselines['zeroed_experts_content_loss'] = measured['zeroed_experts']['content_loss']
  return {
      'title': title(head['after']['expert_bits_per_weight']),
      'source': shown_path(settings.checkpoint), 'headline': head['key'], 'variants': variants,
      'steps': head['steps'], 'before': base['after'], 'after': head['after'],
      'layers': head['layers'], 'baselines': baselines, 'training': training,
      'samples': samples(variants),
      'facts': {
          'experts': config.moe.num_experts if config.moe else 0,
          'model': f'{base["after"]["parameters"]:,} parameters, of which a word meets '
                   f'{base["after"]["active_parameters_per_token"]:,}',
          'live_training': f'{training["seconds"]:.0f} s, {training["steps"]} steps; loss on '
                           f'hidden test words {training["content_loss_before"]:.3f} before, '
                           f'{measured["content_loss"]:.3f} after',
          'calibration': f'{settings.calibration_samples:,} passages of the training years, '
                         f'{data.encoder_length} tokens each',
          'test': f'{measured["content_targets"]:,} hidden words in {measured["batches"]} batches '
                  'of speeches that were not trained on',
          'machine': machine(),
      },
  }


def title(bits: float) -> str:
  """What the headline row reached."""
  reached = 'below one bit' if bits < 1.0 else f'at {bits:.3f} bits'
  return f'A Switch Transformer {reached} a weight'


def samples(variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Test passages with what the uncompressed, the rounded and the headline model fill in."""
  chosen = [v for v in variants if v['key'] in ('bf16', 'rtn', headline_of(variants)['key'])]
  return [
      {'text': example['pieces'], 'guesses': [
          {'name': v['name'], 'pieces': v['evaluation']['examples'][i]['fills']} for v in chosen
      ]}
      for i, example in enumerate(variants[0]['evaluation'].get('examples', ()))
  ]


def shown_path(path: pathlib.Path) -> str:
  """Relative to the repository where it lies inside."""
  return str(path.relative_to(steps.ROOT)) if path.is_relative_to(steps.ROOT) else str(path)


def machine() -> str:
  """Processor, cores and versions."""
  import jax

  name = platform.processor() or platform.machine()
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  if cpuinfo.is_file():
    models = [x for x in cpuinfo.read_text().splitlines() if x.startswith('model name')]
    name = models[0].partition(':')[2].strip() if models else name
  device = jax.devices()[0].platform
  return (f'{os.cpu_count()} cores, {name}; JAX {jax.__version__} on {device}, '
          f'Python {platform.python_version()}')


def table(values: Mapping[str, Any]) -> str:
  """The rows for the terminal."""
  head = f'{"":22}{"stored":>10}{"bits/weight":>13}{"loss":>8}{"agreement":>11}{"seconds":>9}'
  lines = [head, '-' * len(head)]
  for variant in values['variants']:
    measured, size = variant['evaluation'], variant['after']
    agreement = measured.get('agreement', {}).get('top1')
    lines.append(
        f'{variant["name"]:22}{charts.megabytes(size["stored_bytes"]):>10}'
        f'{size["expert_bits_per_weight"]:>13.3f}{measured["content_loss"]:>8.3f}'
        f'{"" if agreement is None else f"{agreement:.1%}":>11}'
        f'{variant.get("seconds", 0.0):>9.0f}'
    )
  for name, label in (
      ('bigram_content_loss', 'a token bigram'),
      ('zeroed_experts_content_loss', 'bf16, experts zeroed'),
  ):
    if name in values['baselines']:
      lines.append(f'{label:22}{"":>23}{values["baselines"][name]:>8.3f}')
  return '\n'.join(lines)


def main() -> None:
  start = time.monotonic()
  settings = settings_from_flags()
  files.require_writable(settings.workdir / 'report.html')
  values = run(settings)
  files.write_json(settings.workdir / 'steps' / 'demo.json', {'seconds': time.monotonic() - start})
  page = report.write(values, settings.workdir, picture=True)
  print('\nloss: nats a hidden word of the test years; bits/weight: of the experts, all counted; '
        'agreement: same first guess as bf16\n')
  print(table(values))
  print(f'\n{page}\n{time.monotonic() - start:.0f} s in all')


if __name__ == '__main__':
  common.run(main, __doc__)
