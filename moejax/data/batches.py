"""Deterministic batches: batch i is a pure function of (corpus, seed, i).

So the whole state of the data is one integer, every process builds only its own rows, and a resumed
run sees what the unbroken run would have seen. `SpanBatches` are those of encoder-decoders; for
decoders see `packing`, for several sources `mixture`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import functools
import queue
import threading
from typing import Any, Protocol

import jax
import numpy as np

from moejax import errors
from moejax.data import span_corruption
from moejax.data import tokenizer as tokenizer_lib

Batch = dict[str, Any]
_ORDER, _CUT, _NOISE = range(3)  # random streams


class Batches(Protocol):
  """Batches by index, without end unless they are fixed.

  `row` and `batch` are pure functions of the index, so a run resumes by it alone.
  """

  @property
  def batch_size(self) -> int:
    """Rows of a batch."""

  @property
  def num_samples(self) -> int:
    """Rows of an epoch; the last may be shared with the next one."""

  @property
  def num_batches(self) -> int:
    """Batches that cover an epoch."""

  @property
  def num_tokens(self) -> int:
    """Tokens of the texts."""

  @property
  def num_documents(self) -> int:
    """Texts."""

  @property
  def spec(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shape [b, ...] and dtype of each array of a batch."""

  def row(self, index: int) -> Batch:
    """Row `index` of the stream of all rows: NumPy arrays without the batch axis."""

  def batch(self, index: int, rows: slice = slice(None)) -> Batch:
    """Rows (default all) of batch `index`, as NumPy arrays."""

  def epoch_of(self, index: int) -> float:
    """How many times the texts have been seen before batch `index`."""


def stack_rows(batches: Batches, index: int, rows: slice = slice(None)) -> Batch:
  """Rows of batch `index`, made one by one; see `Batches.batch`."""
  first = index * batches.batch_size
  made = [batches.row(first + i) for i in range(batches.batch_size)[rows]]
  return {name: np.stack([row[name] for row in made]) for name in made[0]}


def make_spec(batch_size: int, **rows: tuple[int, Any]) -> dict[str, jax.ShapeDtypeStruct]:
  """A `Batches.spec` from the (width, dtype) of each name."""
  return {
      name: jax.ShapeDtypeStruct((batch_size, width), dtype)
      for name, (width, dtype) in rows.items()
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """Tokenized documents end to end: tokens int32 [m]; document i is starts[i] to starts[i + 1]."""

  tokens: np.ndarray
  starts: np.ndarray

  @property
  def num_documents(self) -> int:
    return len(self.starts) - 1


def tokenize(
    documents: Iterable[str], tokenizer: tokenizer_lib.Tokenizer, name: str, *,
    sample_tokens: int = 2, shortest: int = 2, length_field: str = 'data.encoder_length',
) -> Corpus:
  """Turns documents into a `Corpus`, 32 at a time.

  Short documents make short, padded samples or share one; but a text that is, all in all, less than
  one full sample is a mistake.

  Args:
    name: what to call the documents in messages.
    sample_tokens: tokens of a full sample. length_field: the setting that it follows from.
    shortest: documents of fewer tokens are left out.

  Raises:
    UserError: they have less than `sample_tokens` tokens together.
  """
  pieces: list[np.ndarray] = []
  chunk: list[str] = []

  def flush():
    pieces.extend(ids for ids in tokenizer.encode_batch(chunk) if len(ids) >= shortest)
    chunk.clear()

  for document in documents:
    chunk.append(document)
    if len(chunk) == 32:
      flush()
  flush()
  total = sum(len(piece) for piece in pieces)
  if total < sample_tokens:
    raise errors.UserError(
        f'{name}: a text of {total} tokens; one sample has {sample_tokens}: give a longer text, or '
        f'shorten the samples ({length_field})'
    )
  starts = np.cumsum([0] + [len(piece) for piece in pieces])
  return Corpus(tokens=np.concatenate(pieces), starts=starts)


def span_spec(
    batch_size: int, lengths: span_corruption.Lengths
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape and dtype of each array of a span-corrupted batch."""
  source, target = lengths.inputs, lengths.targets
  return make_spec(
      batch_size, encoder_tokens=(source, np.int32), decoder_tokens=(target, np.int32),
      targets=(target, np.int32), weights=(target, np.float32),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanBatches:
  """Span-corrupted batches of a corpus, by index.

  A batch is a dict of `encoder_tokens` int32 [b, s], `decoder_tokens` and `targets` int32 [b, t],
  and `weights` float32 [b, t] (0 on padding).

  A document of L tokens gives ceil(L / T) windows of at most T tokens; none crosses a document. In
  training every epoch has its own order, window cuts and noise. With `fixed=True` (evaluation)
  the cuts and the noise depend on the seed alone and samples come in order.
  """

  corpus: Corpus
  batch_size: int
  lengths: span_corruption.Lengths
  vocab_size: int
  seed: int = 0
  noise_density: float = 0.15
  mean_span: float = 3.0
  pad_id: int = 0
  eos_id: int = 1
  decoder_start_id: int = 0
  fixed: bool = False

  @functools.cached_property
  def _windows(self) -> np.ndarray:
    """Cumulative number of windows, int64 [documents + 1]."""
    sizes = np.diff(self.corpus.starts)
    return np.concatenate(([0], np.cumsum(-(-sizes // self.lengths.tokens))))

  @property
  def num_samples(self) -> int:
    """Samples in an epoch."""
    return int(self._windows[-1])

  @property
  def num_batches(self) -> int:
    """Batches that cover an epoch; the last may be padded when `fixed`."""
    return -(-self.num_samples // self.batch_size)

  @property
  def num_tokens(self) -> int:
    """Tokens of the corpus."""
    return len(self.corpus.tokens)

  @property
  def num_documents(self) -> int:
    """Documents of the corpus."""
    return self.corpus.num_documents

  @property
  def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each array of a batch."""
    return span_spec(self.batch_size, self.lengths)

  def window(self, epoch: int, sample: int) -> np.ndarray:
    """Raw tokens int32 [n], n <= lengths.tokens, of a sample of an epoch (before shuffling)."""
    document = int(np.searchsorted(self._windows, sample, side='right')) - 1
    begin, end = self.corpus.starts[document], self.corpus.starts[document + 1]
    count = int(self._windows[document + 1] - self._windows[document])
    slack = count * self.lengths.tokens - int(end - begin)
    shift = 0
    if not self.fixed and slack > 0 and count > 1:
      shift = int(np.random.default_rng([self.seed, _CUT, epoch, document]).integers(slack + 1))
    start = begin - shift + (sample - int(self._windows[document])) * self.lengths.tokens
    return self.corpus.tokens[max(start, begin) : min(start + self.lengths.tokens, end)]

  @functools.cached_property
  def _order(self) -> Callable[[int], np.ndarray]:
    """The order of samples of an epoch, int64 [num_samples]; remembers the last."""
    draw = lambda epoch: np.random.default_rng([self.seed, _ORDER, epoch])
    return functools.lru_cache(maxsize=1)(lambda epoch: draw(epoch).permutation(self.num_samples))

  def row(self, index: int) -> Batch:
    """Row `index` of the endless stream of samples, unbatched.

    With `fixed`, rows past the end are padding with no weight.
    """
    epoch, position = divmod(index, self.num_samples)
    if self.fixed:
      if epoch > 0:
        return self._pad(np.array([self.eos_id]), np.zeros(0, np.int32))
      sample = position
    else:
      sample = int(self._order(epoch)[position])
    rng = np.random.default_rng([self.seed, _NOISE, epoch, sample])
    inputs, targets = span_corruption.corrupt(
        self.window(epoch, sample), rng, self.vocab_size, eos_id=self.eos_id,
        noise_density=self.noise_density, mean_span=self.mean_span,
    )
    return self._pad(inputs, targets)

  def _pad(self, inputs: np.ndarray, targets: np.ndarray) -> Batch:
    length, used = self.lengths.targets, len(targets)
    row = {
        'encoder_tokens': np.full(self.lengths.inputs, self.pad_id, np.int32),
        'decoder_tokens': np.full(length, self.pad_id, np.int32),
        'targets': np.full(length, self.pad_id, np.int32),
        'weights': np.zeros(length, np.float32),
    }
    row['encoder_tokens'][: len(inputs)] = inputs
    row['targets'][:used] = targets
    row['decoder_tokens'][0] = self.decoder_start_id
    row['decoder_tokens'][1:used] = targets[: used - 1]
    row['weights'][:used] = 1.0
    return row

  def batch(self, index: int, rows: slice = slice(None)) -> Batch:
    """Rows (default all) of batch `index`, as NumPy arrays."""
    return stack_rows(self, index, rows)

  def epoch_of(self, index: int) -> float:
    """How many times the corpus has been seen before batch `index`."""
    return index * self.batch_size / self.num_samples


def to_global(batches: Batches, index: int, sharding: jax.sharding.Sharding) -> Batch:
  """Batch `index` as global arrays; each process makes only the rows its devices hold.

  Args:
    sharding: of [b, ...] arrays; only the leading axis may be split.
  """
  rows = functools.cache(lambda i: batches.row(index * batches.batch_size + i))

  def piece(name: str, where: tuple[slice, ...]) -> np.ndarray:
    picked = range(batches.batch_size)[where[0]]
    return np.stack([rows(i)[name] for i in picked])[(slice(None), *where[1:])]

  return {
      name: jax.make_array_from_callback(
          array.shape, sharding, functools.partial(piece, name), dtype=array.dtype
      )
      for name, array in batches.spec.items()
  }


def prefetch(
    batches: Batches, start: int, stop: int, sharding: jax.sharding.Sharding, depth: int = 2
) -> Iterator[tuple[int, Batch]]:
  """Yields (index, global batch) for start <= index < stop, made ahead by one thread."""
  made: queue.Queue = queue.Queue(maxsize=depth)
  closed = threading.Event()

  def put(item) -> bool:
    while not closed.is_set():
      try:
        made.put(item, timeout=0.1)
        return True
      except queue.Full:
        continue
    return False

  def work():
    try:
      for index in range(start, stop):
        if not put((index, to_global(batches, index, sharding))):
          return
      put(None)
    except BaseException as error:  # handed to the consumer, which raises it
      put(error)

  thread = threading.Thread(target=work, name='batches', daemon=True)
  thread.start()
  try:
    while (item := made.get()) is not None:
      if isinstance(item, BaseException):
        raise item
      yield item
  finally:
    closed.set()
    thread.join()
