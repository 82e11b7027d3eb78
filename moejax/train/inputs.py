"""What a run reads: tokenizer and batches, made from the texts its config names."""

import dataclasses
import pathlib
from typing import Any

import jax

from moejax import config as config_lib
from moejax import errors
from moejax.data import batches as batches_lib
from moejax.data import span_corruption, text
from moejax.data import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """What a run reads: its tokenizer, training batches, and validation batches if any."""

  tokenizer: tokenizer_lib.Tokenizer
  train: batches_lib.SpanBatches
  valid: batches_lib.SpanBatches | None


def load_tokenizer(
    experiment: config_lib.Experiment, workdir: pathlib.Path
) -> tokenizer_lib.Tokenizer:
  """The workdir's tokenizer, else the config's, else that of `init_from`, else a new one."""
  data = experiment.data
  if (workdir / tokenizer_lib.FILE_NAME).is_file():
    tokenizer = tokenizer_lib.load(workdir)
  elif data.tokenizer or experiment.init_from:
    tokenizer = tokenizer_lib.load(data.tokenizer or experiment.init_from)
  else:
    documents = text.documents(data.train_files)
    tokenizer = tokenizer_lib.train(documents, experiment.model.vocab_size, data.num_sentinels)
  if tokenizer.vocab_size != experiment.model.vocab_size:
    raise errors.UserError(
        f'the tokenizer has {tokenizer.vocab_size} ids, model.vocab_size is '
        f'{experiment.model.vocab_size}; make them equal'
    )
  if tokenizer.num_sentinels < data.num_sentinels:
    raise errors.UserError(
        f'the tokenizer has {tokenizer.num_sentinels} sentinels, data.num_sentinels is '
        f'{data.num_sentinels}; lower it'
    )
  return tokenizer


def span_batches(
    experiment: config_lib.Experiment,
    documents: Any,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    fixed: bool = False,
    name: str = 'data.train_files',
) -> batches_lib.SpanBatches:
  """Tokenizes documents and lays them out as the config says; `fixed` for evaluation."""
  data, config = experiment.data, experiment.model
  lengths = span_corruption.lengths_for(data.encoder_length, data.noise_density, data.mean_span)
  if lengths.spans > data.num_sentinels:
    raise errors.UserError(
        f'data.num_sentinels = {data.num_sentinels}: a sample of {lengths.tokens} tokens has '
        f'{lengths.spans} spans; raise it or lower data.encoder_length'
    )
  return batches_lib.SpanBatches(
      corpus=batches_lib.tokenize(documents, tokenizer, name, sample_tokens=lengths.tokens),
      batch_size=experiment.train.batch_size, lengths=lengths, vocab_size=config.vocab_size,
      seed=data.seed, noise_density=data.noise_density, mean_span=data.mean_span,
      pad_id=config.pad_id, eos_id=config.eos_id, decoder_start_id=config.decoder_start_id,
      fixed=fixed,
  )


def load(experiment: config_lib.Experiment, workdir: pathlib.Path) -> Data:
  """Reads, tokenizes and lays out the texts; keeps the tokenizer in the workdir."""
  tokenizer = load_tokenizer(experiment, workdir)
  if jax.process_index() == 0:
    tokenizer.save(workdir)
  train = span_batches(experiment, text.documents(experiment.data.train_files), tokenizer)
  valid = None
  if experiment.data.valid_files:
    documents = text.documents(experiment.data.valid_files, 'data.valid_files')
    valid = span_batches(experiment, documents, tokenizer, fixed=True, name='data.valid_files')
  return Data(tokenizer=tokenizer, train=train, valid=valid)
