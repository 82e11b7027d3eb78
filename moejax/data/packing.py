"""Packed batches of decoders: documents end to end in full rows, by index.

The documents of an epoch, each with an EOS after its text, are one stream of tokens, and the epochs
follow each other without end. A row is `t` tokens of that stream. Its targets are the next tokens
of the documents, so for a segment that goes on in the next row the last target is the first token
of that row: a row knows t + 1 tokens and overlaps the next by one. That way every token but the
first of a document is a target once an epoch; only an EOS, after which nothing comes, has none.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np

from moejax.data.batches import Batch, Corpus, make_spec, stack_rows

_DOCUMENTS, _CUT, _ROWS = range(3)  # random streams


class Stream(NamedTuple):
  """An epoch's documents in order.

  Attributes:
    documents: int64 [n], the document of each part. ends: int64 [n], where the part ends in the
      stream.
    cut: token of its document that the first part begins with; what is before is the last part.
  """

  documents: np.ndarray
  ends: np.ndarray
  cut: int


class Parts(NamedTuple):
  """Pieces of documents that follow each other in a row: int64 [n] each.

  Attributes:
    documents: which. begins: the first token, counted in the document. lengths: how many tokens.
  """

  documents: np.ndarray
  begins: np.ndarray
  lengths: np.ndarray


def plain_stream(sizes: np.ndarray) -> Stream:
  """Documents of so many tokens, EOS counted, in their own order."""
  return Stream(np.arange(len(sizes)), np.cumsum(sizes), 0)


def shuffled_stream(sizes: np.ndarray, length: int, seed: int, epoch: int) -> Stream:
  """Documents in an order of the epoch's own, the first cut at a random token.

  The cut is below `length`, the tokens of a row: it moves all rows against the documents, and even
  a single long text is cut anew.
  """
  order = np.random.default_rng([seed, _DOCUMENTS, epoch]).permutation(len(sizes))
  first = int(sizes[order[0]])
  cut = int(np.random.default_rng([seed, _CUT, epoch]).integers(min(first, length)))
  documents = np.append(order, order[0])
  lengths = sizes[documents]
  lengths[0], lengths[-1] = first - cut, cut
  return Stream(documents, np.cumsum(lengths), cut)


def parts_of(stream: Stream, begin: int, count: int) -> Parts:
  """The pieces that tokens `begin` to `begin + count` of a stream are made of."""
  stop = begin + count
  low = int(np.searchsorted(stream.ends, begin, side='right'))
  high = int(np.searchsorted(stream.ends, stop, side='left')) + 1
  ends = stream.ends[low:high]
  starts = np.concatenate((stream.ends[low - 1 : low] if low else [0], ends[:-1]))
  from_, to = np.maximum(starts, begin), np.minimum(ends, stop)
  begins = from_ - starts
  if low == 0:
    begins[0] += stream.cut
  return Parts(stream.documents[low:high], begins, to - from_)


def lay_out(corpus: Corpus, parts: Parts, length: int, eos_id: int, pad_id: int) -> Batch:
  """A row of `length` tokens from pieces that together have no more.

  Returns:
    A dict of arrays [length]: `tokens` and `targets` int32, `weights` float32, `segments` and
    `positions` int32; see `LmBatches`.
  """
  sizes = parts.lengths
  begins = corpus.starts[parts.documents] + parts.begins
  row_starts = np.cumsum(sizes) - sizes
  used = int(sizes.sum())
  within = np.arange(used) - np.repeat(row_starts, sizes)
  places = np.repeat(begins, sizes) + within
  left = np.repeat(corpus.starts[parts.documents + 1], sizes) - places  # of the text; 0 at EOS
  take = lambda at: corpus.tokens.take(at, mode='clip')
  row = {
      'tokens': np.full(length, pad_id, np.int32), 'targets': np.full(length, pad_id, np.int32),
      'weights': np.zeros(length, np.float32), 'segments': np.zeros(length, np.int32),
      'positions': np.zeros(length, np.int32),
  }
  row['tokens'][:used] = np.where(left > 0, take(places), eos_id)
  row['targets'][:used] = np.where(
      left > 1, take(places + 1), np.where(left == 1, eos_id, pad_id)
  )
  row['weights'][:used] = left > 0
  row['segments'][:used] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
  row['positions'][:used] = within
  return row


def packed_spec(batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape and dtype of each array of a packed batch."""
  return make_spec(
      batch_size, tokens=(length, np.int32), targets=(length, np.int32),
      weights=(length, np.float32), segments=(length, np.int32), positions=(length, np.int32),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmBatches:
  """Packed batches of a corpus, by index.

  A batch is a dict of `tokens` and `targets` int32 [b, t], `weights` float32 [b, t] (0 on EOS,
  which has no target, and on padding), `segments` int32 [b, t] (1, 2, ... by document within the
  row, 0 on padding) and `positions` int32 [b, t] (from 0 in each segment). A document that does not
  fit goes on in the next row, as a segment of its own.

  In training every epoch has its own order of documents, cut and order of rows, and a row may hold
  the end of one epoch and the beginning of the next, so there is no padding. With `fixed=True`
  (evaluation) documents and rows come in order whatever the seed, and the last row is padded.
  """

  corpus: Corpus
  batch_size: int
  sequence_length: int
  seed: int = 0
  pad_id: int = 0
  eos_id: int = 1
  fixed: bool = False

  @functools.cached_property
  def _sizes(self) -> np.ndarray:
    """Tokens of each document with its EOS, int64 [documents]."""
    return np.diff(self.corpus.starts) + 1

  @functools.cached_property
  def stream_tokens(self) -> int:
    """Tokens of an epoch, EOS counted."""
    return int(self._sizes.sum())

  @property
  def num_samples(self) -> int:
    """Rows that hold an epoch."""
    return -(-self.stream_tokens // self.sequence_length)

  @property
  def num_batches(self) -> int:
    """Batches that cover an epoch; the last may be padded when `fixed`."""
    return -(-self.num_samples // self.batch_size)

  @property
  def num_tokens(self) -> int:
    """Tokens of the corpus, without EOS."""
    return len(self.corpus.tokens)

  @property
  def num_documents(self) -> int:
    """Documents of the corpus."""
    return self.corpus.num_documents

  @property
  def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each array of a batch."""
    return packed_spec(self.batch_size, self.sequence_length)

  @functools.cached_property
  def _stream(self) -> Callable[[int], Stream]:
    """The stream of an epoch; two are remembered, for rows that end in the next one."""
    if self.fixed:
      plain = plain_stream(self._sizes)
      return lambda epoch: plain
    make = lambda epoch: shuffled_stream(self._sizes, self.sequence_length, self.seed, epoch)
    return functools.lru_cache(maxsize=2)(make)

  @functools.cached_property
  def _order(self) -> Callable[[int], np.ndarray]:
    """The order of the rows that begin in an epoch, numbered from its first."""

    def make(epoch: int) -> np.ndarray:
      rng = np.random.default_rng([self.seed, _ROWS, epoch])
      return rng.permutation(self._first_row(epoch + 1) - self._first_row(epoch))

    return functools.lru_cache(maxsize=1)(make)

  def _first_row(self, epoch: int) -> int:
    """The first row of the endless stream that begins in an epoch."""
    return -(-epoch * self.stream_tokens // self.sequence_length)

  def begin_of(self, index: int) -> int:
    """The first token, in the endless stream of epochs, of row `index`."""
    if self.fixed:
      return index * self.sequence_length
    epoch = index * self.sequence_length // self.stream_tokens
    first = self._first_row(epoch)
    return (first + int(self._order(epoch)[index - first])) * self.sequence_length

  def _pieces(self, index: int) -> Iterator[Parts]:
    begin, count = self.begin_of(index), self.sequence_length
    if self.fixed:
      count = min(count, max(self.stream_tokens - begin, 0))
    while count > 0:
      epoch, place = divmod(begin, self.stream_tokens)
      here = min(count, self.stream_tokens - place)
      yield parts_of(self._stream(epoch), place, here)
      begin, count = begin + here, count - here

  def row(self, index: int) -> Batch:
    """Row `index` of the endless stream of rows, unbatched.

    With `fixed`, rows past the end are padding with no weight.
    """
    pieces = list(self._pieces(index)) or [Parts(*np.zeros((3, 0), np.int64))]
    parts = pieces[0]
    if len(pieces) > 1:
      parts = Parts(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True)))
    return lay_out(self.corpus, parts, self.sequence_length, self.eos_id, self.pad_id)

  def batch(self, index: int, rows: slice = slice(None)) -> Batch:
    """Rows (default all) of batch `index`, as NumPy arrays."""
    return stack_rows(self, index, rows)

  def epoch_of(self, index: int) -> float:
    """How many times the corpus has been seen before batch `index`."""
    return index * self.batch_size * self.sequence_length / self.stream_tokens
