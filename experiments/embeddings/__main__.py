"""Splits an encoder and measures its embeddings: nearness to the original, and linear probes.

Example:
  python -m experiments.embeddings.fetch
  python -m experiments.convert --source runs/embeddings/minilm --out runs/embeddings/gelu \
      --format moejax
  python -m experiments.train --config configs/relufy.py:relu@runs/embeddings/gelu \
      --set 'data.train_files=["runs/embeddings/bbc/train","runs/embeddings/r8/train"]' \
      --set data.sequence_length=64 --set train.eval_every=0 --workdir runs/embeddings/relu
  python -m experiments.embeddings --model runs/embeddings/relu/model

What is in --out already is not done again, so it can be stopped and started.
"""

from collections.abc import Callable
import pathlib
from typing import Any

from absl import flags
import numpy as np
import tqdm

from experiments import flags as common
from experiments import pages
from experiments.embeddings import page, probe
from experiments.moefied import runs
from moejax import files
from moejax.compress import compress, relufy
from moejax.data import tokenizer as tokenizer_lib
from moejax.data import whole_texts
from moejax.model import Model

_MODEL = flags.DEFINE_string('model', 'runs/embeddings/relu/model', 'The encoder to split.')
_REFERENCE = flags.DEFINE_string('reference', 'runs/embeddings/gelu', 'The one it came from.')
_TEXTS = flags.DEFINE_string('texts', 'runs/embeddings', 'Where experiments.embeddings.fetch put.')
_PAIRS = flags.DEFINE_list('pairs', list(page.PAIRS), 'split/choice of each.')
_SHARES = flags.DEFINE_list('shares', ['0.1', '0.2', '0.3', '0.5'], 'Of the neurons that run.')
_FORMS = flags.DEFINE_list('forms', ['plain', 'fitted'], 'Of plain, fitted, filled.')
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Of the split and the router.')
_SIZE = flags.DEFINE_integer('expert_size', 32, 'Neurons of an expert.', lower_bound=1)
_LENGTH = flags.DEFINE_integer('length', 64, 'Tokens of a text.', lower_bound=4)
_TRAIN = flags.DEFINE_integer('train', 600, 'Texts of each set for probes.', lower_bound=10)
_TEST = flags.DEFINE_integer('test', 300, 'Texts of each set for tests.', lower_bound=10)
_SAMPLES = flags.DEFINE_integer('samples', 128, 'Texts of each set for calibration.', lower_bound=1)
_OUT = flags.DEFINE_string('out', 'experiments/evidence/embeddings.json', 'Where figures go.')
_PAGE = flags.DEFINE_string('page', 'experiments/RESULTS_EMBEDDINGS.md', 'Where the page goes.')

SETS = ('bbc', 'r8')


class Measure:
  """Embeds the texts of all sets with a model; tells probes' accuracy and nearness."""

  def __init__(self, reference: Model, folder: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer):
    self._length = _LENGTH.value
    self.texts = {
        (name, part): probe.read(folder / name / part, tokenizer, self._length, limit)
        for name in SETS for part, limit in (('train', _TRAIN.value), ('test', _TEST.value))
    }
    self._reference: dict[str, np.ndarray] = {}
    self.before = self(reference)

  def __call__(self, model: Model) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in SETS:
      train, test = (self.texts[name, part] for part in ('train', 'test'))
      ours, theirs = (probe.embed(model, t.ids, self._length) for t in (train, test))
      found[f'{name}_accuracy'] = round(
          probe.accuracy(ours, train.labels, theirs, test.labels), 4
      )
      known = self._reference.setdefault(name, theirs)
      found[f'{name}_cosine'] = round(probe.fidelity(theirs, known), 4)
    return found

  def calibration(self) -> list[dict[str, np.ndarray]]:
    """Rows for splitting, in batches."""
    rows = [
        whole_texts.row_of(ids, self._length)
        for name in SETS for ids in self.texts[name, 'train'].ids[: _SAMPLES.value]
    ]
    return [
        {key: np.stack([row[key] for row in rows[i : i + 32]]) for key in rows[0]}
        for i in range(0, len(rows), 32)
    ]


def main() -> None:
  folder, source = files.require_folder(_MODEL.value), files.require_folder(_REFERENCE.value)
  out = pathlib.Path(_OUT.value)
  about = {
      'model': str(folder), 'reference': str(source), 'expert_size': _SIZE.value,
      'length': _LENGTH.value, 'train': _TRAIN.value, 'test': _TEST.value,
      'samples': _SAMPLES.value,
  }
  result = pages.opened(out, about, models={}, runs={})
  left = runs.left(
      result['runs'], _PAIRS.value, _SHARES.value, _FORMS.value, _SEEDS.value
  )
  if left or len(result['models']) < len(page.MODELS):
    go_on(folder, source, left, result, out)
  image = out.with_suffix('.png')
  files.write_whole(image, page.draw(result))
  page.write(pathlib.Path(_PAGE.value), result, image)


def go_on(
    folder: pathlib.Path, source: pathlib.Path, left: list[tuple[str, ...]],
    result: dict[str, Any], out: pathlib.Path,
) -> None:
  """Does what is left, and writes each run as it is done."""
  reference, model = Model.load(source), Model.load(folder)
  measure = Measure(reference, pathlib.Path(_TEXTS.value), tokenizer_lib.load(source))
  calibration = measure.calibration()
  made: dict[str, Callable[[], Any]] = {
      'original': lambda: reference, 'trained': lambda: model,
      'swapped': lambda: relufy.relufy(reference, 'relu'),
      'teal': lambda: relufy.relufy(reference, 'teal', calibration, sparsity=0.5),
  }
  for name in page.MODELS:
    if name not in result['models']:
      result['models'][name] = measure.before if name == 'original' else measure(made[name]())
      files.write_json(out, result)
  for split, choice, share, form, seed in tqdm.tqdm(left, disable=None):
    step = runs.step_of(split, choice, float(share), form, int(seed), _SIZE.value)
    done = compress(model, step, calibration)
    rows = done.report['layers']
    mean = lambda name: sum(row[name] for row in rows) / len(rows)
    result['active'] = mean('active_neurons')
    result['runs']['/'.join((split, choice, share, form, seed))] = {
        **measure(done.model), 'recall': round(mean('mass_recall'), 4),
        'error': round(mean('relative_output_error'), 4),
    }
    files.write_json(out, result)


if __name__ == '__main__':
  common.run(main, __doc__)
