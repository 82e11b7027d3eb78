"""Our own byte-level BPE tokenizer, trained on the corpus and laid out as T5 lays out its ids.

pad 0, EOS 1, unknown 2; sentinel k is `<extra_id_k>` with id vocab_size - 1 - k (arXiv 1910.10683,
3.1.4), and there may be none. The merges come from `tokenizers`; this file only fixes the layout.
"""

from collections.abc import Iterable, Sequence
import os
import pathlib

import numpy as np

from moejax import errors, files

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
SPECIAL = ('<pad>', '</s>', '<unk>')
_ENDS = ('</s>', '<|endoftext|>', '[SEP]')
_MASKS = ('[MASK]', '<mask>', '<extra_id_0>')
FILE_NAME = 'tokenizer.json'


class Tokenizer:
  """Text to ids and back; a thin shell over a `tokenizers.Tokenizer`."""

  def __init__(self, backend):
    self._backend = backend

  @property
  def vocab_size(self) -> int:
    """Number of ids, sentinels included."""
    return self._backend.get_vocab_size(with_added_tokens=True)

  @property
  def num_sentinels(self) -> int:
    """Number of sentinels at the top of the vocabulary."""
    count = 0
    while self._backend.token_to_id(f'<extra_id_{count}>') == self.vocab_size - 1 - count:
      count += 1
    return count

  @property
  def first_sentinel(self) -> int:
    """The least sentinel id, or the size of the vocabulary where there is none."""
    return self.vocab_size - self.num_sentinels

  @property
  def eos_id(self) -> int | None:
    """Id of `</s>`, else of `<|endoftext|>` or `[SEP]`; None if it knows none."""
    return self._first_known(_ENDS)

  @property
  def mask_id(self) -> int | None:
    """Id of `[MASK]`, else of `<mask>` or the first sentinel; None if it knows none."""
    return self._first_known(_MASKS)

  def _first_known(self, names: Iterable[str]) -> int | None:
    known = (self._backend.token_to_id(name) for name in names)
    return next((token for token in known if token is not None), None)

  def encode(self, text: str, special: bool = False) -> np.ndarray:
    """Ids int32 [n] of a text; `special` adds what the file puts around a text, as BOS or EOS."""
    return np.array(self._backend.encode(text, add_special_tokens=special).ids, np.int32)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of several texts, in parallel."""
    encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """The text of ids; special tokens are left out unless `skip_special` is False."""
    return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

  def to_bytes(self) -> bytes:
    """The file `tokenizer.json`."""
    return self._backend.to_str(pretty=False).encode()

  def save(self, folder: str | os.PathLike) -> pathlib.Path:
    """Writes `tokenizer.json` into a folder, whole or not at all; UserError if it cannot."""
    path = pathlib.Path(folder) / FILE_NAME
    files.write_whole(path, self.to_bytes())
    return path


def train(texts: Iterable[str], vocab_size: int, num_sentinels: int = 100) -> Tokenizer:
  """Trains a byte-level BPE of exactly `vocab_size` ids on documents.

  A corpus too small for that many merges leaves unused ids below the sentinels.

  Raises:
    UserError: `vocab_size` has no room for 256 bytes, the special ids and the sentinels.
  """
  import tokenizers

  room = vocab_size - num_sentinels
  if room < 256 + len(SPECIAL):
    raise errors.UserError(
        f'vocabulary of {vocab_size} ids: needs at least {256 + len(SPECIAL) + num_sentinels} for '
        f'bytes, special ids and {num_sentinels} sentinels; raise model.vocab_size'
    )
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=SPECIAL[UNK_ID]))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=room,
      special_tokens=list(SPECIAL),
      initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
      show_progress=False,
  )
  backend.train_from_iterator(texts, trainer)
  unused = [f'<unused_{i}>' for i in range(room - backend.get_vocab_size())]
  sentinels = [f'<extra_id_{k}>' for k in reversed(range(num_sentinels))]
  backend.add_special_tokens(unused + sentinels)
  return Tokenizer(backend)


def load(path: str | os.PathLike) -> Tokenizer:
  """Loads `tokenizer.json`, or the one in a folder.

  Raises:
    UserError: the file is missing or is no tokenizer.
  """
  import tokenizers

  file = pathlib.Path(path)
  if file.is_dir():
    file = file / FILE_NAME
  if not file.is_file():
    raise errors.UserError(
        f'no tokenizer at {file}: put the one that came with the model there'
    )
  try:
    backend = tokenizers.Tokenizer.from_file(str(file))
  except Exception as error:  # the library raises a bare Exception
    raise errors.UserError(f'{file} is not a tokenizer: {error}') from error
  # Rows are cut and padded here, to lengths of our own.
  backend.no_padding()
  backend.no_truncation()
  return Tokenizer(backend)
