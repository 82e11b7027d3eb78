"""Embeddings of texts, how near they are to others, and what a linear probe reads from them."""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from moejax import files
from moejax.data import tokenizer as tokenizer_lib
from moejax.data import whole_texts
from moejax.errors import UserError
from moejax.model import Model, apply_fn

_ROWS = 32
RIDGE = 1.0


@dataclasses.dataclass(frozen=True)
class Texts:
  """Rows of one set: ids by text, and the label of each, int [n]."""

  ids: tuple[np.ndarray, ...]
  labels: np.ndarray
  names: tuple[str, ...]


def read(
    folder: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer, length: int, limit: int
) -> Texts:
  """At most `limit` texts of a folder with a folder for each label, drawn evenly by a fixed seed.

  Raises:
    UserError: fewer than two labels.
  """
  labels = sorted(p for p in files.require_folder(folder).iterdir() if p.is_dir())
  if len(labels) < 2:
    raise UserError(f'{folder}: one folder of texts for each label, at least two')
  found = [(path, i) for i, label in enumerate(labels) for path in sorted(label.glob('*.txt'))]
  order = np.random.default_rng(0).permutation(len(found))[:limit]
  ids = whole_texts.framed(
      (found[i][0].read_text(errors='replace') for i in order), tokenizer, length, str(folder)
  )
  return Texts(ids, np.array([found[i][1] for i in order]), tuple(p.name for p in labels))


def embed(model: Model, texts: Sequence[np.ndarray], length: int) -> np.ndarray:
  """Means of the last hidden states over a text's tokens at length 1, float32 [n, d]."""
  out = []
  for start in range(0, len(texts), _ROWS):
    some = list(texts[start : start + _ROWS])
    some += [np.zeros(0, np.int32)] * (_ROWS - len(some))
    rows = [whole_texts.row_of(t, length, model.config.pad_id or 0) for t in some]
    tokens, real = (np.stack([r[name] for r in rows]) for name in ('tokens', 'segments'))
    out.append(np.asarray(_embed(model.config, model.params, tokens, real > 0)))
  return np.concatenate(out)[: len(texts)]


@functools.partial(jax.jit, static_argnames=('config',))
def _embed(config, params, tokens_bt, valid_bt):
  states = apply_fn(config, params, tokens_bt, valid_bt=valid_bt).encoder_bsd
  count = jnp.maximum(valid_bt.sum(1, keepdims=True), 1)
  mean = jnp.where(valid_bt[..., None], states, 0).sum(1) / count
  return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-9)


def fidelity(ours: np.ndarray, theirs: np.ndarray) -> float:
  """The mean cosine of embeddings of length 1."""
  return float((ours * theirs).sum(-1).mean())


def accuracy(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> float:
  """Of a ridge regression onto the labels, one for each, on centred embeddings."""
  mean = train.mean(0)
  x = (train - mean).astype(np.float64)
  wanted = np.eye(int(labels.max()) + 1)[labels]
  weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ (wanted - wanted.mean(0)))
  scores = (test - mean) @ weights + wanted.mean(0)
  return float((scores.argmax(-1) == test_labels).mean())
