"""Fixed evaluation batches from text, laid out as the model was trained, and true predecessors."""

from collections.abc import Collection, Iterable, Iterator, Mapping
import dataclasses
import pathlib
from typing import Any

import numpy as np

from moejax import config as config_lib
from moejax import files, store
from moejax.data import batches as batches_lib
from moejax.data import layout
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


def data_config(
    *folders: str | pathlib.Path, sample_length: int = 0
) -> config_lib.DataConfig:
  """How a model was trained to see text: from the manifest of the first folder that tells, or of
  the folder it was made from; else the defaults.

  sample_length: tokens a sample instead; 0 for what was found.
  """
  found = _found_config(*folders)
  if not sample_length:
    return found
  return dataclasses.replace(found, encoder_length=sample_length, sequence_length=sample_length)


def _found_config(*folders: str | pathlib.Path) -> config_lib.DataConfig:
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
        try:
          return config_lib.from_json(config_lib.DataConfig, found, 'data')
        except UserError as error:
          raise UserError(f'{path / store.MANIFEST}: provenance: {error}') from error
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
) -> batches_lib.Batches:
  """Batches that are the same on every call: span-corrupted, or packed for a decoder.

  Raises:
    UserError: see `layout.make_batches`.
  """
  return layout.make_batches(
      config, data, documents, tokenizer, batch_size=batch_size, fixed=True, name=name
  )


def spread(batches: batches_lib.Batches, limit: int) -> Iterator[dict[str, Any]]:
  """At most `limit` batches (0: all) spread evenly over the text."""
  total = batches.num_batches
  count = min(limit, total) if limit else total
  for i in range(count):
    yield batches.batch(i * total // count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContentTokens:
  """Words to predict and the true token before each, int [n]; -1 where nothing comes before."""

  tokens: np.ndarray
  previous: np.ndarray


def previous_tokens(
    batch: Mapping[str, Any], config: config_lib.ModelConfig, first_sentinel: int
) -> ContentTokens:
  """The content tokens of a batch with the token that stands before them in the text.

  For a decoder that is the token at the target's own place. For an encoder-decoder it is the target
  before, inside a span; at the head of a span it is the encoder token before the span's sentinel.
  """
  targets = np.asarray(batch['targets'])
  if isinstance(config, config_lib.EncoderConfig):
    raise UserError(
        f'a {config.family} sees both sides of a word: bigrams are no measure for it'
    )
  if isinstance(config, config_lib.StackConfig):
    content = (np.asarray(batch['weights']) > 0) & ~np.isin(targets, config.eos_ids)
    return ContentTokens(
        tokens=targets[content].astype(np.int64),
        previous=np.asarray(batch['tokens'])[content].astype(np.int64),
    )
  first = first_sentinel
  encoder = np.asarray(batch['encoder_tokens'])
  content = (np.asarray(batch['weights']) > 0) & (targets < first) & (targets != config.eos_id)
  before = np.full((len(encoder), config.vocab_size - first), -1, np.int64)
  rows, columns = np.nonzero((encoder >= first)[:, 1:])
  before[rows, encoder[rows, columns + 1] - first] = encoder[rows, columns]
  left = np.concatenate([np.full((len(targets), 1), -1), targets[:, :-1]], axis=1)
  heads = left >= first
  row_of = np.broadcast_to(np.arange(len(targets))[:, None], targets.shape)
  previous = np.where(heads, before[row_of, np.where(heads, left - first, 0)], left)
  return ContentTokens(tokens=targets[content].astype(np.int64), previous=previous[content])


def example_pieces(
    example: Mapping[str, list[int]], tokenizer: tokenizer_lib.Tokenizer,
    ends: Collection[int] = (1,),
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """An example as text (`metrics.examples_of`): [{'text', 'hidden'}] of the passage with the spans
  put back, and [{'text', 'right'}] of the guesses, one a hidden token; for a decoder the passage
  whole, and a guess for each token that follows one of its text. `ends`: ids that end a text."""
  if 'tokens' in example:
    passage = tokenizer.decode([token for token in example['tokens'] if token not in ends])
    return [{'text': passage, 'hidden': False}], [
        {'text': _word(tokenizer, guess), 'right': guess == target}
        for target, guess in zip(example['targets'], example['guesses'], strict=True)
        if target not in ends
    ]
  first = tokenizer.first_sentinel
  spans: dict[int, list[int]] = {}
  guesses, current = [], None
  for target, guess in zip(example['targets'], example['guesses'], strict=True):
    if target >= first:
      current = spans.setdefault(target, [])
    elif target not in ends and current is not None:
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
    elif token not in ends:
      plain.append(token)
  flush()
  return pieces, guesses


def _word(tokenizer: tokenizer_lib.Tokenizer, token: int) -> str:
  text = tokenizer.decode([token], skip_special=False).strip()
  return text if text else '␣'
