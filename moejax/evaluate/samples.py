"""Fixed evaluation batches from text, laid out as the model was trained, and true predecessors."""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import pathlib
from typing import Any

import numpy as np

from moejax import config as config_lib
from moejax import files, store
from moejax.data import batches as batches_lib
from moejax.data import span_corruption
from moejax.data import tokenizer as tokenizer_lib
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


def data_config(*folders: str | pathlib.Path) -> config_lib.DataConfig:
  """How a model was trained to see text: from the manifest of the first folder that tells, or of
  the folder it was made from; else the defaults."""
  for folder in folders:
    seen: set[pathlib.Path] = set()
    path = pathlib.Path(folder)
    while path not in seen and (path / store.MANIFEST).is_file():
      seen.add(path)
      provenance = files.read_json(path / store.MANIFEST).get('provenance')
      if not isinstance(provenance, Mapping):
        break
      found = _find_data(provenance)
      if found is not None:
        return config_lib.from_json(config_lib.DataConfig, found, 'data')
      path = pathlib.Path(str(provenance.get('source', '')))
  return config_lib.DataConfig()


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
    UserError: the tokenizer is another model's, or the text is shorter than one sample.
  """
  if tokenizer.vocab_size != config.vocab_size:
    raise UserError(
        f'the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}: '
        'use the tokenizer.json that came with the model'
    )
  lengths = span_corruption.lengths_for(data.encoder_length, data.noise_density, data.mean_span)
  corpus = batches_lib.tokenize(documents, tokenizer, name, sample_tokens=lengths.tokens)
  return batches_lib.SpanBatches(
      corpus=corpus, batch_size=batch_size, lengths=lengths,
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


def example_pieces(
    example: Mapping[str, list[int]], tokenizer: tokenizer_lib.Tokenizer, eos_id: int = 1
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """An example as text: [{'text', 'hidden'}] of the passage with the spans put back, and
  [{'text', 'right'}] of the guesses, one for each hidden token (`metrics.examples_of`)."""
  first = tokenizer.vocab_size - tokenizer.num_sentinels
  spans: dict[int, list[int]] = {}
  guesses, current = [], None
  for target, guess in zip(example['targets'], example['guesses'], strict=True):
    if target >= first:
      current = spans.setdefault(target, [])
    elif target != eos_id and current is not None:
      current.append(target)
      guesses.append({'text': _word(tokenizer, guess), 'right': guess == target})
  pieces: list[dict[str, Any]] = []
  plain: list[int] = []

  def flush():
    if plain:
      pieces.append({'text': tokenizer.decode(plain), 'hidden': False})
      plain.clear()

  for token in example['encoder']:
    if token >= first:
      flush()
      pieces.append({'text': tokenizer.decode(spans.get(token, [])), 'hidden': True})
    elif token != eos_id:
      plain.append(token)
  flush()
  return pieces, guesses


def _word(tokenizer: tokenizer_lib.Tokenizer, token: int) -> str:
  text = tokenizer.decode([token], skip_special=False).strip()
  return text if text else '␣'
