"""A classification task of texts in a folder a label, as one word to predict."""

import pathlib
from typing import Any

import numpy as np

from moejax import config, files
from moejax.data import tokenizer as tokenizer_lib
from moejax.errors import UserError

_FIRST_WORD = 3  # ids below are padding, end and unknown


def samples(
    folder: pathlib.Path, model: config.ModelConfig, tokenizer: tokenizer_lib.Tokenizer,
    length: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """(training, test) samples, each a batch of one; a fifth is for the test, the same on every call.

  The first `length` tokens of a text are read; its label is the only target, an id that stands for
  nothing else here. Texts that are there twice count once.

  Raises:
    UserError: fewer than two labels, or one without texts.
  """
  labels = sorted(path for path in files.require_folder(folder).iterdir() if path.is_dir())
  if len(labels) < 2:
    raise UserError(f'{folder}: one folder of texts for each label, at least two')
  seen, found = set(), []
  for label, place in enumerate(labels):
    texts = [p.read_text(errors='ignore') for p in sorted(place.glob('*.txt'))]
    if not texts:
      raise UserError(f'{place} holds no .txt')
    for text in texts:
      if text not in seen:
        seen.add(text)
        tokens = np.asarray(tokenizer.encode(text)[: length - 1], np.int32)
        found.append(_sample(tokens, label, model, length))
  order = np.random.default_rng(0).permutation(len(found))
  cut = len(found) // 5
  return [found[i] for i in order[cut:]], [found[i] for i in order[:cut]]


def _sample(tokens, label, model, length) -> dict[str, Any]:
  target = _FIRST_WORD + label
  if isinstance(model, config.StackConfig):
    read = len(tokens) + 1
    ids, real, last = np.zeros((3, 1, length), np.int32)
    ids[0, :read] = [*tokens, model.eos_ids[0]]
    real[0, :read] = 1
    last[0, read - 1] = 1
    return {
        'tokens': ids, 'segments': real, 'positions': real * np.arange(length, dtype=np.int32),
        'targets': last * target, 'weights': last.astype(np.float32),
    }
  encoder = np.full((1, length), model.pad_id, np.int32)
  encoder[0, : len(tokens)] = tokens
  encoder[0, len(tokens)] = model.eos_id
  return {
      'encoder_tokens': encoder, 'targets': np.full((1, 1), target, np.int32),
      'decoder_tokens': np.full((1, 1), model.decoder_start_id, np.int32),
      'weights': np.ones((1, 1), np.float32),
  }
