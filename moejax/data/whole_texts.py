"""A text a row, as its tokenizer frames it: for models that tell something of a whole text."""

from collections.abc import Iterable
import dataclasses

import jax
import numpy as np

from moejax import errors
from moejax.data import tokenizer as tokenizer_lib
from moejax.data.batches import Batch, stack_rows
from moejax.data.packing import packed_spec

_ORDER = 4  # random stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextBatches:
  """Batches of whole texts, cut at `sequence_length`, by index.

  Arrays are those of `packing.LmBatches`; the targets are the tokens read, of no weight. In
  training each epoch has its own order and rows go on with the next; with `fixed` rows past the end
  are padding.
  """

  texts: tuple[np.ndarray, ...]
  batch_size: int
  sequence_length: int
  seed: int = 0
  pad_id: int = 0
  fixed: bool = False

  @property
  def num_samples(self) -> int:
    """Rows that hold an epoch."""
    return len(self.texts)

  @property
  def num_batches(self) -> int:
    """Batches that cover an epoch."""
    return -(-self.num_samples // self.batch_size)

  @property
  def num_tokens(self) -> int:
    """Tokens of all texts, cut."""
    return sum(map(len, self.texts))

  @property
  def num_documents(self) -> int:
    """Texts."""
    return len(self.texts)

  @property
  def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each array of a batch."""
    return packed_spec(self.batch_size, self.sequence_length)

  def row(self, index: int) -> Batch:
    """Row `index` of the endless stream of rows, unbatched."""
    epoch, place = divmod(index, len(self.texts))
    none = np.zeros(0, np.int32)
    if self.fixed:
      return row_of(none if epoch else self.texts[place], self.sequence_length, self.pad_id)
    order = np.random.default_rng([self.seed, _ORDER, epoch]).permutation(len(self.texts))
    return row_of(self.texts[order[place]], self.sequence_length, self.pad_id)

  def batch(self, index: int, rows: slice = slice(None)) -> Batch:
    """Rows (default all) of batch `index`, as NumPy arrays."""
    return stack_rows(self, index, rows)

  def epoch_of(self, index: int) -> float:
    """How many times the texts have been seen before batch `index`."""
    return index * self.batch_size / len(self.texts)


def row_of(ids: np.ndarray, length: int, pad_id: int = 0) -> Batch:
  """One text of at most `length` ids as a row."""
  used = len(ids)
  row = {
      'tokens': np.full(length, pad_id, np.int32), 'segments': np.zeros(length, np.int32),
      'positions': np.zeros(length, np.int32), 'weights': np.zeros(length, np.float32),
  }
  row['tokens'][:used], row['segments'][:used] = ids, 1
  row['positions'][:used] = np.arange(used)
  return {**row, 'targets': row['tokens'].copy()}


def framed(
    texts: Iterable[str], tokenizer: tokenizer_lib.Tokenizer, length: int, name: str
) -> tuple[np.ndarray, ...]:
  """Each text's ids with what the tokenizer puts around it, its end cut to fit `length`.

  Of a text without a word they are none.

  Raises:
    UserError: no text, or a length without room for a token.
  """
  around = len(tokenizer.encode('', special=True))
  if length <= around:
    raise errors.UserError(
        f'data.sequence_length = {length}: the tokenizer puts {around} tokens around a text; raise '
        'it'
    )
  found = []
  for text in texts:
    ids = tokenizer.encode(text, special=True)
    cut = len(ids) - length
    if cut > 0:
      # What stands behind the text stays there.
      plain = tokenizer.encode(text)
      begin = next(
          (i for i in range(around + 1) if np.array_equal(ids[i : i + len(plain)], plain)), 0
      )
      ids = np.concatenate([ids[:begin], plain[: len(plain) - cut], ids[begin + len(plain) :]])
    found.append(ids.astype(np.int32) if len(ids) > around else np.zeros(0, np.int32))
  if not any(map(len, found)):
    raise errors.UserError(f'{name}: no text with a word in it')
  return tuple(found)
