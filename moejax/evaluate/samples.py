"""Fixed evaluation batches from text, laid out as the model was trained, and true predecessors."""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import pathlib
from typing import Any

import numpy as np

from moejax import config as config_lib, files, store
from moejax.data import batches as batches_lib, span_corruption, tokenizer as tokenizer_lib
from moejax.errors import UserError


def _find_data(values: Any) -> Mapping[str, Any] | None:
  """The first {'data': {'encoder_length': ...}} in nested JSON."""
  if not isinstance(values, Mapping):
    return None
  data = values.get('data')
  if isinstance(data, Mapping) and 'encoder_length' in data:
    return data
  found = (_find_data(value) for value in values.values())
  return next((data for data in found if data is not None), None)


def data_config(folder: str | pathlib.Path) -> config_lib.DataConfig:
  """How the model in a folder was trained to see text, by its manifest; else the defaults."""
  manifest = files.read_json(pathlib.Path(folder) / store.MANIFEST)
  found = _find_data(manifest.get('provenance', {}))
  if found is None:
    return config_lib.DataConfig()
  return config_lib.from_json(config_lib.DataConfig, found, 'data')


def fixed_batches(
    config: config_lib.ModelConfig,
    data: config_lib.DataConfig,
    documents: Iterable[str],
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    batch_size: int = 32,
    name: str = 'the text',
) -> batches_lib.SpanBatches:
  """Span-corrupted batches that are the same on every call.

  Raises:
    UserError: the tokenizer is another model's, or there is no text of two tokens.
  """
  if tokenizer.vocab_size != config.vocab_size:
    raise UserError(
        f'the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}: '
        'use the tokenizer.json that came with the model'
    )
  return batches_lib.SpanBatches(
      corpus=batches_lib.tokenize(documents, tokenizer, name), batch_size=batch_size,
      lengths=span_corruption.lengths_for(
          data.encoder_length, data.noise_density, data.mean_span
      ),
      vocab_size=config.vocab_size, seed=data.seed, noise_density=data.noise_density,
      mean_span=data.mean_span, pad_id=config.pad_id, eos_id=config.eos_id,
      decoder_start_id=config.decoder_start_id, fixed=True,
  )


def spread(batches: batches_lib.SpanBatches, limit: int) -> Iterator[dict[str, Any]]:
  """At most `limit` batches (0: all) spread evenly over the text."""
  total = batches.num_batches
  count = min(limit, total) if limit else total
  for i in range(count):
    yield batches.batch(i * total // count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContentTokens:
  """Masked words and the true token before each, int [n]; -1 where nothing comes before."""

  tokens: np.ndarray
  previous: np.ndarray


def previous_tokens(
    batch: Mapping[str, Any], config: config_lib.ModelConfig, num_sentinels: int
) -> ContentTokens:
  """The content tokens of a batch with the token that stands before them in the text.

  Inside a span that is the target before; at the head of a span it is the encoder token before the
  span's sentinel.
  """
  first = config.vocab_size - num_sentinels
  targets = np.asarray(batch['targets'])
  encoder = np.asarray(batch['encoder_tokens'])
  content = (np.asarray(batch['weights']) > 0) & (targets < first) & (targets != config.eos_id)
  before = np.full((len(encoder), num_sentinels), -1, np.int64)
  rows, columns = np.nonzero((encoder >= first)[:, 1:])
  before[rows, encoder[rows, columns + 1] - first] = encoder[rows, columns]
  left = np.concatenate([np.full((len(targets), 1), -1), targets[:, :-1]], axis=1)
  heads = left >= first
  row_of = np.broadcast_to(np.arange(len(targets))[:, None], targets.shape)
  previous = np.where(heads, before[row_of, np.where(heads, left - first, 0)], left)
  return ContentTokens(tokens=targets[content].astype(np.int64), previous=previous[content])
