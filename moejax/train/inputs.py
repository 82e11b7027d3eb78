"""What a run reads: tokenizer and batches, made from the texts its config names."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np

from moejax import config as config_lib
from moejax import errors
from moejax.data import batches as batches_lib
from moejax.data import layout, mixture, text
from moejax.data import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """What a run reads: its tokenizer, training batches, and validation batches if any."""

  tokenizer: tokenizer_lib.Tokenizer
  train: batches_lib.Batches
  valid: batches_lib.Batches | None


def load_tokenizer(
    experiment: config_lib.Experiment, workdir: pathlib.Path, resuming: bool
) -> tokenizer_lib.Tokenizer:
  """The workdir's if its run is resumed, else the config's, that of `init_from`, or a new one.

  Raises:
    UserError: it does not fit the model, or cannot be read or trained.
  """
  data, config = experiment.data, experiment.model
  sentinels = layout.num_sentinels(config, data)
  if resuming and (workdir / tokenizer_lib.FILE_NAME).is_file():
    tokenizer = tokenizer_lib.load(workdir)
  elif data.tokenizer or experiment.init_from:
    tokenizer = tokenizer_lib.load(data.tokenizer or experiment.init_from)
  else:
    _check_layout(config)
    tokenizer = tokenizer_lib.train(text.documents(data.train_files), config.vocab_size, sentinels)
  layout.check_tokenizer(config, tokenizer)
  if tokenizer.num_sentinels < sentinels:
    raise errors.UserError(
        f'the tokenizer has {tokenizer.num_sentinels} sentinels, data.num_sentinels is '
        f'{sentinels}; lower it'
    )
  return tokenizer


def _check_layout(config: config_lib.ModelConfig) -> None:
  """Raises UserError for a decoder whose texts end otherwise than a new tokenizer has it."""
  ends = getattr(config, 'eos_ids', ())
  if ends and ends[0] != tokenizer_lib.EOS_ID:
    raise errors.UserError(
        f'model.eos_ids = {ends}: a new tokenizer ends texts with {tokenizer_lib.EOS_ID}; set '
        f'model.eos_ids=[{tokenizer_lib.EOS_ID}], or name the model\'s own in data.tokenizer'
    )


def train_batches(
    experiment: config_lib.Experiment, tokenizer: tokenizer_lib.Tokenizer
) -> batches_lib.Batches:
  """The training texts as one source, or as a mixture by `data.train_weights`.

  Raises:
    UserError: a text cannot be read, or is shorter than one sample.
  """
  data = experiment.data
  make = functools.partial(
      layout.make_batches, experiment.model, tokenizer=tokenizer,
      batch_size=experiment.train.batch_size,
  )
  if not data.train_weights:
    return make(data, text.documents(data.train_files))
  sources, weights = [], []
  for i, (entry, weight) in enumerate(zip(data.train_files, data.train_weights, strict=True)):
    if weight > 0:
      own = dataclasses.replace(data, seed=_source_seed(data.seed, i))
      sources.append(make(own, text.documents([entry]), name=f'data.train_files: {entry}'))
      weights.append(weight)
  return mixture.Mixture(sources=tuple(sources), weights=tuple(weights))


def _source_seed(seed: int, source: int) -> int:
  """A seed of its own for each source, so that two of one length do not go in step."""
  return int(np.random.SeedSequence([seed, source]).generate_state(1)[0])


def load(
    experiment: config_lib.Experiment, workdir: pathlib.Path, *, resuming: bool = False
) -> Data:
  """Reads, tokenizes and lays out the texts; keeps the tokenizer in the workdir.

  Args:
    resuming: the workdir holds checkpoints of this run, and so its tokenizer.

  Raises:
    UserError: a text or the tokenizer is missing, broken, too short, or does not fit the model.
  """
  tokenizer = load_tokenizer(experiment, workdir, resuming)
  train = train_batches(experiment, tokenizer)
  valid = None
  if experiment.data.valid_files:
    valid = layout.make_batches(
        experiment.model, experiment.data,
        text.documents(experiment.data.valid_files, 'data.valid_files'), tokenizer,
        batch_size=experiment.train.batch_size, fixed=True, name='data.valid_files',
    )
  if jax.process_index() == 0:
    tokenizer.save(workdir)
  return Data(tokenizer=tokenizer, train=train, valid=valid)
