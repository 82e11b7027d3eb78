"""QMoE's compressed format (arXiv 2310.16795, section 4), bit for bit: dictionary, codes, offsets.

Each row is coded on its own into 16-bit codewords of one shared dictionary, which is grown from
pairs of ternary symbols (0 zero, 1 row minimum, 2 row maximum) for a zero share of 0.885. A file
holds, for each matrix, the codewords of all rows back to back, `rows + 1` offsets into them, and
the two levels of each row in bf16.

Host functions in NumPy; `decode_matrix` works under jit. No entry holds more than three nonzeros,
so decoding reads one uint32 a codeword (length and three signed positions) and not 28 symbols.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.codec import ternary_jax
from moejax.errors import UserError

ENTRIES = 65536
ZERO_SHARE = 0.885
MAX_PAIRS = 14
ROOT = ENTRIES
_NONE = 63


class Dictionary(NamedTuple):
  """The shared dictionary.

  decode_words int32 [131072]: the reference's decode table, two words an entry.
  trie int32 [65537, 9]: child of an entry (row 65536: the root) by pair id, -1 for none.
  entries uint32 [65536]: symbols in bits 0..4, then three fields of 6 bits, (position << 1 | is
    maximum), 63 where there is no further nonzero.
  """

  decode_words: np.ndarray
  trie: np.ndarray
  entries: np.ndarray


def _candidates(floor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """All pair strings of probability `floor` and more: pair ids [n, 14] (-1 past the end), float64
  probabilities multiplied from the left, and the index of each string without its last pair."""
  one = (1 - ZERO_SHARE) / 2
  single = (ZERO_SHARE, one, one)
  pair = np.array([1.0 * single[r % 3] * single[r // 3] for r in range(9)])
  strings = np.full((1, MAX_PAIRS), -1, np.int64)
  probability, index = np.ones(1), np.full(1, -1)
  out, first = [], 0
  for depth in range(MAX_PAIRS):
    longer = probability[:, None] * pair
    above, last = np.nonzero(longer >= floor)
    strings = strings[above]
    strings[:, depth] = last
    out.append((strings, longer[above, last], index[above]))
    probability = longer[above, last]
    index = first + np.arange(len(above))
    first += len(above)
  return tuple(np.concatenate(parts) for parts in zip(*out))  # type: ignore[return-value]


@functools.cache
def dictionary() -> Dictionary:
  """Builds the dictionary: the 65,536 most probable strings of up to 14 pairs.

  Equally probable strings come in lexicographic order. A string is always less probable than its
  beginning, so sorting all strings gives the order of the reference's priority queue.
  """
  floor = 1e-5
  strings, probability, parent = _candidates(floor)
  while len(strings) < ENTRIES:
    floor /= 2
    strings, probability, parent = _candidates(floor)
  order = np.lexsort((*strings.T[::-1], -probability))[:ENTRIES]
  rank = np.full(len(strings) + 1, ROOT)
  rank[order] = np.arange(ENTRIES)
  strings = strings[order]
  count = (strings >= 0).sum(1)
  trie = np.full((ENTRIES + 1, 9), -1, np.int32)
  trie[rank[parent[order]], strings[np.arange(ENTRIES), count - 1]] = np.arange(ENTRIES)

  used = strings >= 0
  symbols = np.stack([strings % 3, strings // 3], axis=-1)
  symbols = np.where(used[..., None], symbols, 0).reshape(ENTRIES, 2, 14)
  shifts = 4 + 2 * np.arange(14)
  words = (symbols << shifts).sum(-1) | count[:, None]
  decode_words = words.astype(np.uint32).reshape(-1).view(np.int32)

  flat = symbols.reshape(ENTRIES, 28)
  entry, position = np.nonzero(flat)
  slot = np.arange(len(entry)) - np.searchsorted(entry, entry)
  fields = np.full((ENTRIES, 3), _NONE)
  fields[entry, slot] = (position << 1) | (flat[entry, position] - 1)
  packed = (2 * count) | (fields << (5 + 6 * np.arange(3))).sum(1)
  return Dictionary(decode_words, trie, packed.astype(np.uint32))


def encode(symbols_rc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Codes uint16 and row offsets int32 [rows + 1] of symbols {0, 1, 2}, as the reference packs.

  Raises:
    UserError: a symbol outside {0, 1, 2}, or not a matrix.
  """
  symbols_rc = np.asarray(symbols_rc)
  if symbols_rc.ndim != 2 or 0 in symbols_rc.shape:
    raise UserError(f'symbols have shape {symbols_rc.shape}; [rows, cols] is needed')
  if symbols_rc.min() < 0 or symbols_rc.max() > 2:
    raise UserError(
        f'ternary symbols are 0, 1 and 2, these span {symbols_rc.min()}..{symbols_rc.max()}'
    )
  rows, cols = symbols_rc.shape
  padded = np.pad(symbols_rc.astype(np.uint8), ((0, 0), (0, cols % 2)))
  pairs = np.ascontiguousarray((padded[:, 0::2] + 3 * padded[:, 1::2]).T)
  trie = dictionary().trie
  codes = np.empty((len(pairs), rows), np.uint16)
  ends = np.empty((len(pairs), rows), bool)
  node = trie[ROOT][pairs[0]]
  for step in range(1, len(pairs)):
    child = trie[node, pairs[step]]
    ends[step - 1] = child < 0
    codes[step - 1] = node
    node = np.where(child < 0, trie[ROOT][pairs[step]], child)
  ends[-1], codes[-1] = True, node
  offsets = np.concatenate([[0], np.cumsum(ends.sum(0))]).astype(np.int32)
  return codes.T[ends.T], offsets


def labels(w_rc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Symbols uint8 [rows, cols] and levels [rows, 2] (minimum, maximum) of a quantised matrix.

  As in the reference, equality with the row's maximum overrides equality with its minimum, so a
  row without negative weights spends symbol 1 on its zeros.
  """
  levels = np.stack([w_rc.min(1), w_rc.max(1)], axis=1)
  symbols = np.where(w_rc == levels[:, 1:], 2, np.where(w_rc == levels[:, :1], 1, 0))
  return symbols.astype(np.uint8), levels


def decode(codes: np.ndarray, row_offsets: np.ndarray, cols: int) -> np.ndarray:
  """Symbols uint8 [rows, cols] of codes and offsets.

  Raises:
    UserError: offsets do not rise from 0 to the number of codes, or a row's codes do not fill it.
  """
  rows = len(row_offsets) - 1
  starts, entries = _checked_starts(codes, row_offsets, cols)
  out = np.zeros((rows, cols + cols % 2), np.uint8)
  flat = out.reshape(-1)
  for shift in (5, 11, 17):
    field = (entries >> np.uint32(shift)) & np.uint32(63)
    use = field != _NONE
    flat[starts[use] + (field[use] >> np.uint32(1))] = 1 + (field[use] & np.uint32(1))
  return np.ascontiguousarray(out[:, :cols])


def check(codes: np.ndarray, row_offsets: np.ndarray, cols: int, name: str = 'matrix') -> None:
  """Raises UserError as `decode` does."""
  _checked_starts(codes, row_offsets, cols, name)


def _checked_starts(codes, row_offsets, cols, name='matrix'):
  counts = np.diff(np.asarray(row_offsets).astype(np.int64))
  if row_offsets[0] != 0 or row_offsets[-1] != codes.size or counts.size == 0 or counts.min() < 1:
    raise UserError(
        f'{name}: row offsets {row_offsets[0]}..{row_offsets[-1]} do not rise through '
        f'{codes.size} codes; codes are truncated or offsets damaged; restore the file'
    )
  entries = dictionary().entries[codes]
  length = (entries & np.uint32(31)).astype(np.int64)
  covered = np.add.reduceat(length, np.asarray(row_offsets[:-1], np.int64))
  bad = np.flatnonzero(covered != cols + cols % 2)
  if bad.size:
    raise UserError(
        f'{name}, row {bad[0]}: codes stand for {covered[bad[0]]} weights, the row has {cols}; '
        'codes and offsets do not belong together; restore the file'
    )
  return np.cumsum(length) - length, entries


@functools.partial(jax.jit, static_argnames=('rows', 'cols', 'max_words'))
def decode_matrix(
    words_w: jax.Array, offsets_r: jax.Array, *, rows: int, cols: int, max_words: int
) -> jax.Array:
  """{-1, 0, 1} of one matrix, int8 [rows, cols], under jit.

  Args:
    words_w: uint16 codewords of a layer; offsets_r: int32 or uint32 [rows + 1] into it.
    rows, cols: static sizes. max_words: static bound on the codewords of a matrix, at most w.
  """
  words, own, offsets_r = ternary_jax.window(words_w[None], 0, offsets_r, max_words)
  entries = jnp.asarray(dictionary().entries)[words]
  length = jnp.where(own, (entries & 31).astype(jnp.int32), 0)
  start = ternary_jax.starts(length, offsets_r, jnp.full(rows, cols))
  fields = [((entries >> shift) & 63).astype(jnp.int32) for shift in (5, 11, 17)]
  return ternary_jax.place(start, fields, own, _NONE, (rows, cols))
