"""What the methods are compared on: texts to continue or fill in, or texts to label."""

from collections.abc import Callable, Sequence
import dataclasses
import pathlib
from typing import Any

import numpy as np
import tqdm

from experiments.fewer import labelled, training
from moejax import evaluate, store
from moejax.data import layout, text
from moejax.data import tokenizer as tokenizer_lib
from moejax.errors import UserError

TASK_LENGTH = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """A model and its samples.

  folder: of the model. calibration: (how many, seed) -> that many samples. validation: batches of
  one sample. batches: i -> a training batch.
  """

  folder: pathlib.Path
  calibration: Callable[[int, int], list[dict[str, Any]]]
  validation: Sequence[dict[str, Any]]
  batches: Callable[[int], dict[str, Any]]
  sentinel: int


def drawn(total: int, count: int, seed: int) -> list[int]:
  """`count` of `total` places in order, drawn by a seed."""
  chosen = np.random.default_rng(seed).choice(total, min(count, total), replace=False)
  return sorted(chosen.tolist())


def of_texts(
    folder: pathlib.Path, train: Sequence[str], test: Sequence[str], tests: int, size: int
) -> Problem:
  """The model's own task on texts."""
  config, data = store.Source(folder).config, evaluate.data_config(folder)
  tokenizer = tokenizer_lib.load(str(folder))

  def fixed(patterns, flag):
    return evaluate.fixed_batches(
        config, data, text.documents(list(patterns), flag), tokenizer, batch_size=1, name=flag
    )

  own = fixed(train, '--calibration')
  batches = layout.make_batches(
      config, data, text.documents(list(train)), tokenizer, batch_size=size
  )
  return Problem(
      folder=folder, batches=batches.batch, sentinel=tokenizer.first_sentinel,
      validation=list(evaluate.spread(fixed(test, '--test'), tests)),
      calibration=lambda count, seed: [
          own.batch(i) for i in drawn(own.num_batches, count, seed)
      ],
  )


def of_labels(
    folder: pathlib.Path, texts: pathlib.Path, tuned: pathlib.Path, steps: int, size: int
) -> tuple[Problem, dict[str, float]]:
  """The model, fine-tuned to label texts, in `tuned`, where it stays; and how well it does.

  Raises:
    UserError: `tuned` holds another model, or one tuned in another way.
  """
  tokenizer = tokenizer_lib.load(str(folder))
  train, test = labelled.samples(
      texts, store.Source(folder).config, tokenizer, TASK_LENGTH
  )

  def batches(i: int) -> dict[str, Any]:
    chosen = np.random.default_rng((1, i)).integers(0, len(train), size)
    return training.stacked([train[j] for j in chosen], size)[0]

  tune = training.Training(None, steps, size, learning_rate=1e-3)
  how = {'source': str(folder), 'task': texts.name, 'steps': steps, 'size': size}
  if not (tuned / store.MANIFEST).is_file():
    with tqdm.tqdm(total=steps, desc='fine-tuning', disable=None) as bar:
      tune(folder, lambda i: (bar.update(), batches(i))[1], test, tuned, provenance=how)
  elif (held := store.Source(tuned).manifest.get('provenance')) != how:
    raise UserError(f'{tuned} holds a model of {held}, not of {how}: see --tuned')
  problem = Problem(
      folder=tuned, batches=batches, sentinel=tokenizer.first_sentinel, validation=test,
      calibration=lambda count, seed: [train[i] for i in drawn(len(train), count, seed)],
  )
  return problem, tune(tuned, batches, test, train=False)
