"""The steps of the demo; each remembers its inputs, so that a rerun only does what is new."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

from configs import sotu_switch16
from moejax import config as config_lib
from moejax import evaluate, files, progress, store
from moejax.compress import driver, matrix
from moejax.compress.quantize import Quantize, quantize
from moejax.data import text
from moejax.data import tokenizer as tokenizer_lib
from moejax.errors import UserError, did_you_mean
from moejax.train import loop, writers

ROOT = pathlib.Path(__file__).resolve().parent.parent
FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What the demo can be told.

  `train_seconds` are of training steps, compilation left out; no `rows` are all of them.
  """

  checkpoint: pathlib.Path
  workdir: pathlib.Path
  train_files: tuple[str, ...] = sotu_switch16.TRAIN
  test_files: tuple[str, ...] = sotu_switch16.TEST
  train_seconds: float = 120.0
  learning_rate: float = 1e-4
  train_batch: int = 16
  calibration_samples: int = 2048
  test_batches: int = 40
  rows: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """One row of the table; transform None is the model as it is."""

  key: str
  name: str
  note: str
  transform: Quantize | None


def recipes(rows: Sequence[str] = ()) -> tuple[Recipe, ...]:
  """The rows of these keys, all if none is named; the uncompressed model comes first always.

  Raises:
    UserError: there is no row of a key.
  """
  every = _recipes()
  keys = [recipe.key for recipe in every]
  for key in rows:
    if key not in keys:
      raise UserError(f'no row {key!r}: {", ".join(keys)}{did_you_mean(key, keys)}')
  return every[:1] + tuple(r for r in every[1:] if not rows or r.key in rows)


def _recipes() -> tuple[Recipe, ...]:
  search = matrix.Search(target_bits=1.0)
  return (
      Recipe(key='bf16', name='bf16', note='as trained, 16 bits a weight', transform=None),
      Recipe(key='rtn', name='RTN ternary', note='each weight rounded to the nearest of three',
             transform=quantize('ternary', method='rtn', refit=False)),
      Recipe(key='qmoe', name='QMoE ternary', note='rounded with the errors corrected on real text',
             transform=quantize('ternary', refit=False)),
      Recipe(key='refit', name='QMoE ternary + refit',
             note='then the two values of each row refitted',
             transform=quantize('ternary')),
      Recipe(key='search', name='QMoE searched grid',
             note='largest inputs first, range of values searched, at most 1.0 bit in all',
             transform=quantize('ternary', act_order=True, refit=False, search=search)),
      Recipe(key='two_bit', name='QMoE 2-bit', note='four values a row instead of three',
             transform=quantize(2, refit=False)),
  )


HEADLINE = 'search'


class Memory:
  """Results of steps as JSON files, valid for exactly the inputs they were made from."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder

  def step(
      self, name: str, inputs: Mapping[str, Any], made: pathlib.Path | None,
      work: Callable[[], Mapping[str, Any]],
  ) -> tuple[dict[str, Any], bool]:
    """The result of `work`, kept from last time if inputs are the same and `made` is still there.

    Returns: the result, and whether it was kept.
    """
    key = hashlib.sha256(
        json.dumps({'format': FORMAT, 'step': name, **inputs}, sort_keys=True).encode()
    ).hexdigest()
    file = self._folder / f'{name}.json'
    if file.is_file() and (made is None or made.exists()):
      try:
        kept = files.read_json(file)
      except UserError:
        kept = {}  # cut off by a kill: do it again
      if kept.get('key') == key:
        return kept['result'], True
    result = dict(work())
    files.write_json(file, {'key': key, 'result': result})
    return result, False


def fingerprint(folder: pathlib.Path) -> str:
  """What a model folder holds, from its manifest's checksums."""
  manifest = files.read_json(folder / store.MANIFEST)
  return hashlib.sha256(json.dumps(manifest['files'], sort_keys=True).encode()).hexdigest()


def text_fingerprint(sources: tuple[str, ...]) -> dict[str, Any]:
  """Names of the sources and checksums of the files and archives among them."""
  paths = {source.partition('::')[0] for source in sources}
  sums = {p: files.sha256(pathlib.Path(p)) for p in sorted(paths) if pathlib.Path(p).is_file()}
  return {'sources': list(sources), 'sha256': sums}


# --- Training


def experiment_of(settings: Settings) -> config_lib.Experiment:
  """The checkpoint's own model and samples, trained on at a small constant rate."""
  base = sotu_switch16.get_config()
  data = dataclasses.replace(
      evaluate.data_config(settings.checkpoint), train_files=settings.train_files,
      valid_files=(), tokenizer='',
  )
  optim = dataclasses.replace(
      base.optim, learning_rate=settings.learning_rate, schedule='constant', warmup_steps=20
  )
  train = dataclasses.replace(
      base.train, steps=1_000_000, batch_size=settings.train_batch, log_every=10, eval_every=0,
      checkpoint_every=100, keep_checkpoints=1, save_dtype='bfloat16', max_seconds=0.0,
      peak_flops_per_second=1.0,  # utilisation is not reported here, so its peak is not measured
  )
  return dataclasses.replace(
      base, model=store.Source(settings.checkpoint).config, data=data, optim=optim, train=train,
      init_from=str(settings.checkpoint),
  )


class Stopwatch:
  """Ends training after so many seconds of steps, over restarts too, and shows the time left."""

  def __init__(self, file: pathlib.Path, seconds: float):
    self._file, self._seconds = file, seconds
    self._before = files.read_json(file)['seconds'] if file.is_file() else 0.0
    self._start: float | None = None

  @property
  def elapsed(self) -> float:
    """Seconds of steps so far."""
    return self._before + (0.0 if self._start is None else time.monotonic() - self._start)

  def should_stop(self) -> bool:
    """Asked after each step; the first, which compiles, does not count."""
    self._start = time.monotonic() if self._start is None else self._start
    return self.elapsed >= self._seconds

  def hook(self, record: writers.Record) -> None:
    """Prints a line and keeps the time."""
    left = progress.clock(self._seconds - self.elapsed)
    bar = progress.blocks(self.elapsed / max(self._seconds, 1e-9), 20)
    loss, speed = record.metrics['cross_entropy'], record.metrics['tokens_per_second']
    print(f'{bar} step {record.step}  loss {loss:.3f}  {speed:,.0f} tokens/s  {left} left',
          file=sys.stderr, flush=True)
    files.write_json(self._file, {'seconds': self.elapsed})


def train(settings: Settings) -> dict[str, Any]:
  """Continues the checkpoint's training; returns steps, seconds and the loss curve."""
  folder = settings.workdir / 'train'
  experiment = experiment_of(settings)
  started = settings.workdir / 'train' / 'started_from.json'
  origin = {
      'checkpoint': fingerprint(settings.checkpoint), 'config': config_lib.to_json(experiment)
  }
  if started.is_file() and files.read_json(started) != origin:
    shutil.rmtree(folder)  # of another checkpoint or other settings
  elif not started.is_file() and any(not p.name.endswith('.partial') for p in folder.glob('*')):
    raise UserError(f'{folder} is not of the demo: name a new folder with --workdir')
  folder = loop.prepare_workdir(folder)
  files.write_json(started, origin)
  watch = Stopwatch(folder / 'elapsed.json', settings.train_seconds)
  metrics = writers.JsonLines(folder / 'metrics.jsonl', sys.maxsize)
  result = loop.run(
      experiment, folder, hooks=[watch.hook, metrics], should_stop=watch.should_stop
  )
  rows = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  # A run that was killed repeats the steps after its last checkpoint: the later ones count.
  losses = {row['step']: round(row['cross_entropy'], 4) for row in rows if row['kind'] == 'train'}
  curve = [[step, losses[step]] for step in sorted(losses)]
  return {'steps': result['step'], 'seconds': watch.elapsed, 'curve': curve}


# --- Compression


def calibration(settings: Settings, folder: pathlib.Path) -> list[dict[str, Any]]:
  """Span-corrupted samples spread over the training years."""
  tokenizer = tokenizer_lib.load(folder)
  config = store.Source(folder).config
  batches = evaluate.fixed_batches(
      config, evaluate.data_config(folder), text.documents(settings.train_files), tokenizer,
      batch_size=1, name='the calibration text',
  )
  return list(evaluate.spread(batches, settings.calibration_samples))


def compress(
    recipe: Recipe, model: pathlib.Path, out: pathlib.Path, batches: list[dict[str, Any]],
    sentinel: int,
) -> dict[str, Any]:
  """Runs one recipe; returns its 'steps' and 'layers' rows."""
  transform = recipe.transform
  assert transform is not None
  start = time.monotonic()
  result = driver.compress(model, transform, batches, out, sentinel=sentinel, progress=True)
  seconds = time.monotonic() - start
  layers = [
      {name: row[name] for name in (
          'path', 'expert', 'transform', 'bits', 'bits_per_weight', 'zeros',
          'relative_output_error', 'error_before_refit', 'fallback', 'tokens',
      ) if name in row}
      for row in result.report['layers']
  ]
  return {
      'steps': result.report['steps'], 'layers': layers, 'seconds': seconds,
      'calibration_tokens': result.report.get('tokens'),
  }


# --- Evaluation


def evaluate_fresh(
    settings: Settings, model: pathlib.Path, against: pathlib.Path | None, *, baselines: bool
) -> dict[str, Any]:
  """Measures a model folder on the test years in a process of its own.

  The processes share compiled programs: the uncompressed model's is the same in each.
  """
  command = [
      sys.executable, '-m', 'experiments.evaluate', '--model', str(model), '--examples', '3',
      '--max_batches', str(settings.test_batches),
  ]
  for source in settings.test_files:
    command += ['--data', source]
  if against is not None:
    command += ['--against', str(against)]
  if baselines:
    command.append('--ablate')
    for source in settings.train_files:
      command += ['--bigram', source]
  cache = {'JAX_COMPILATION_CACHE_DIR': str(settings.workdir / 'jax_cache')}
  done = subprocess.run(
      command, cwd=ROOT, env={**cache, **os.environ}, stdout=subprocess.PIPE, text=True,
      check=False,
  )
  if done.returncode != 0:
    raise UserError(
        f'measuring {model} failed with exit code {done.returncode}; its message is above'
    )
  result = json.loads(done.stdout)
  if result['content_loss'] is None:
    raise UserError(f'measuring {model} gave a loss that is not finite: its weights are broken')
  return result
