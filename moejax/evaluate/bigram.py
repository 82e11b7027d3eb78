"""The baseline a language model has to beat: a token bigram with interpolated Kneser-Ney smoothing.

Kneser and Ney 1995; the interpolated form is Chen and Goodman 1998, section 2.7. Counts never cross
a document.
"""

from collections.abc import Iterable, Mapping
import dataclasses
from typing import Any, Self

import numpy as np

from moejax import config as config_lib
from moejax.data import batches as batches_lib
from moejax.errors import UserError
from moejax.evaluate import samples


def discount(counts: np.ndarray) -> float:
  """Ney's estimate n1 / (n1 + 2 n2) from how many counts are 1 and 2; 0.75 where that fails."""
  ones, twos = int(np.sum(counts == 1)), int(np.sum(counts == 2))
  if ones == 0 or twos == 0:
    return 0.75
  return ones / (ones + 2 * twos)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bigram:
  """P(w | v) = max(c(vw) - D, 0) / c(v) + D * N(v.) / c(v) * P(w), with N(v.) the number of
  different successors of v.

  P(w), used alone where nothing is known of v, is the Kneser-Ney unigram: the number of different
  predecessors of w over that of all pairs, discounted and mixed with 1 / v.

  Attributes:
    keys: int64, sorted v * vocab_size + w of the pairs seen; counts: how often each.
    context: int64 [v], c(v) as a first token; successors: int64 [v], N(v.).
    unigram: float64 [v], P(w).
    discount: D.
  """

  vocab_size: int
  keys: np.ndarray
  counts: np.ndarray
  context: np.ndarray
  successors: np.ndarray
  unigram: np.ndarray
  discount: float

  @classmethod
  def train(cls, corpus: batches_lib.Corpus, vocab_size: int, words: int | None = None) -> Self:
    """Counts a corpus.

    Args:
      vocab_size: ids in all. words: ids that can be a word (the uniform part), default all.

    Raises:
      UserError: no document has two tokens.
    """
    tokens = corpus.tokens.astype(np.int64)
    inside = np.ones(len(tokens), bool)
    inside[corpus.starts[:-1]] = False
    second = np.flatnonzero(inside)
    if len(second) == 0:
      raise UserError('the bigram needs a text of at least two tokens')
    keys, counts = np.unique(tokens[second - 1] * vocab_size + tokens[second], return_counts=True)
    first, last = keys // vocab_size, keys % vocab_size
    context = np.bincount(first, weights=counts, minlength=vocab_size).astype(np.int64)
    successors = np.bincount(first, minlength=vocab_size)
    predecessors = np.bincount(last, minlength=vocab_size)
    words = vocab_size if words is None else words
    cut = discount(predecessors[predecessors > 0])
    rest = cut * np.sum(predecessors > 0) / len(keys)
    unigram = np.maximum(predecessors - cut, 0.0) / len(keys) + rest / words
    return cls(
        vocab_size=vocab_size, keys=keys, counts=counts, context=context, successors=successors,
        unigram=unigram, discount=discount(counts),
    )

  def probability(self, previous: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """P(token | previous) of int arrays [n]; a previous of -1 is unknown."""
    previous, tokens = np.asarray(previous, np.int64), np.asarray(tokens, np.int64)
    known = previous >= 0
    v = np.where(known, previous, 0)
    key = v * self.vocab_size + tokens
    place = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
    count = np.where(self.keys[place] == key, self.counts[place], 0)
    total = np.where(known, self.context[v], 0)
    seen = total > 0
    total = np.maximum(total, 1)
    direct = np.maximum(count - self.discount, 0.0) / total
    backoff = self.discount * self.successors[v] / total
    lower = self.unigram[tokens]
    return np.where(seen, direct + backoff * lower, lower)

  def content_loss(
      self, batches: Iterable[Mapping[str, Any]], config: config_lib.ModelConfig,
      first_sentinel: int,
  ) -> float:
    """Mean -log P (nats) at the masked words, or at a decoder's targets, given the token before."""
    total, count = 0.0, 0
    for batch in batches:
      words = samples.previous_tokens(batch, config, first_sentinel)
      total -= float(np.log(self.probability(words.previous, words.tokens)).sum())
      count += len(words.tokens)
    return total / max(count, 1)
