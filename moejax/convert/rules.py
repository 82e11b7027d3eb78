"""One two-way rule language between foreign tensor names and params paths.

A rule says which foreign tensor is which leaf and how the axes lie:

  Rule('encoder.block.{i}.layer.1.mlp.experts.expert_{e}.wi.weight',
       'encoder/layers_{i}/ffn/experts/wi', 'f d -> e d f', layers='encoder_sparse')

Left of the arrow are the foreign axes, right of it ours; `(n h)` is one foreign axis that is two of
ours. A letter that is only on the right is a stacked axis: one foreign tensor for each of its
indices, or one row of a foreign tensor. `expand` makes a rule concrete for a model's sizes; `match`
accounts for every tensor.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import math
import re

import numpy as np

from moejax.convert import checkpoint
from moejax.errors import UserError, nearest
from moejax.safetensors_io import Chunked, check_finite


@dataclasses.dataclass(frozen=True)
class Rule:
  """One row of a family's table.

  theirs: the foreign name; `{i}` stands for the layer, `{e}` for the stacked index.
  ours: the params path.
  axes: 'foreign -> ours', in axis letters.
  layers: which layers `{i}` runs over, a key of the `layers` given to `expand`.
  aliases: other names the same tensor has had; read, never written.
  copies: further names under which the same values may lie beside it; read (they must be equal),
    and written if `write_copies`.
  shares: reads a tensor that another rule owns.
  rows: the stacked indices are the rows of one foreign tensor; `axes` are those of a row.
  part: (index, count): ours is one of `count` equal parts of the first of these axes. A rule with
    rows or parts is read only.
  """

  theirs: str
  ours: str
  axes: str
  layers: str = ''
  aliases: tuple[str, ...] = ()
  copies: tuple[str, ...] = ()
  write_copies: bool = False
  shares: bool = False
  rows: bool = False
  part: tuple[int, int] = (0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """A rule made concrete: one leaf of ours, and the foreign tensor or stack of tensors."""

  ours: str
  shape: tuple[int, ...]
  names: tuple[tuple[str, ...], ...]  # for each stacked index: its name, then its aliases
  copies: tuple[str, ...]
  write_copies: bool
  shares: bool
  their_shape: tuple[int, ...]
  split: tuple[int, ...]
  order: tuple[int, ...]
  stacked: bool
  rows: bool
  part: tuple[int, int]

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    """The shape of a whole foreign tensor: with all parts and rows."""
    first, *rest = self.their_shape
    whole = (first * self.part[1], *rest)
    return (self.shape[0], *whole) if self.rows else whole

  def to_ours(self, array: np.ndarray) -> np.ndarray:
    """One foreign tensor, or row of it, as (one index of) our leaf: a view."""
    index, count = self.part
    if count > 1:
      size = self.their_shape[0]
      array = array[index * size : (index + 1) * size]
    return array.reshape(self.split).transpose(self.order)

  def to_theirs(self, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_ours`."""
    return np.ascontiguousarray(array.transpose(np.argsort(self.order))).reshape(self.their_shape)


def parse_axes(axes: str) -> tuple[list[list[str]], list[str], str]:
  """'(n h) d -> e d n h' as ([[n, h], [d]], [e, d, n, h], 'e'), the last the stacked letter."""
  left, arrow, right = axes.partition('->')
  groups = [g.strip('()').split() for g in re.findall(r'\([^)]*\)|\S+', left)]
  letters = [letter for group in groups for letter in group]
  ours = right.split()
  stacked = [letter for letter in ours if letter not in letters]
  consistent = arrow and set(letters) <= set(ours) and len(set(ours)) == len(ours)
  if not consistent or len(stacked) > 1 or (stacked and ours[0] != stacked[0]):
    raise ValueError(f'bad axes {axes!r}')
  return groups, ours, stacked[0] if stacked else ''


def expand(
    rules: Iterable[Rule], sizes: Mapping[str, int], layers: Mapping[str, Sequence[int]]
) -> tuple[Entry, ...]:
  """Makes rules concrete: axis letters get sizes, `{i}` runs over the layers, `{e}` is stacked."""
  return tuple(
      _entry(rule, sizes, i)
      for rule in rules
      for i in (layers[rule.layers] if rule.layers else (0,))
  )


def _entry(rule: Rule, sizes: Mapping[str, int], i: int) -> Entry:
  groups, ours, stacked = parse_axes(rule.axes)
  letters = [letter for group in groups for letter in group]
  inner = ours[1:] if stacked else ours
  patterns = (rule.theirs, *rule.aliases)
  return Entry(
      ours=rule.ours.format(i=i),
      shape=tuple(sizes[letter] for letter in ours),
      names=tuple(
          tuple(p.format(i=i, e=e) for p in patterns)
          for e in range(sizes[stacked] if stacked else 1)
      ),
      copies=tuple(c.format(i=i) for c in rule.copies),
      write_copies=rule.write_copies,
      shares=rule.shares,
      their_shape=tuple(math.prod(sizes[letter] for letter in group) for group in groups),
      split=tuple(sizes[letter] for letter in letters),
      order=tuple(letters.index(letter) for letter in inner),
      stacked=bool(stacked),
      rows=rule.rows,
      part=rule.part,
  )


@dataclasses.dataclass(frozen=True)
class Match:
  """An entry and the tensors of a checkpoint that are it; `copies` must equal the first."""

  entry: Entry
  found: tuple[str, ...]
  copies: tuple[str, ...]


def match(
    entries: Sequence[Entry],
    source: checkpoint.Checkpoint,
    ignored: Sequence[str] = (),
) -> tuple[Match, ...]:
  """Gives every tensor of a checkpoint to exactly one entry, and every entry its tensors.

  `ignored` are regexes of tensors that a family's files may hold beside those.

  Raises:
    UserError: a tensor is missing, extra, there under two names, or of another shape.
  """
  names = source.names()
  left = set(names)
  matches: list[Match] = []
  missing: list[tuple[str, Entry]] = []
  for entry in entries:
    copies = [name for name in entry.copies if name in left]
    found = []
    for candidates in entry.names:
      present = [name for name in candidates if name in (names if entry.shares else left)]
      if not present and copies and not entry.stacked:
        present = [copies.pop(0)]
      if len(present) > 1:
        raise UserError(
            f'{source.where}: {present[0]!r} and {present[1]!r} are two names of one tensor: '
            'remove one'
        )
      if present:
        found.append(present[0])
      else:
        missing.append((candidates[0], entry))
    for name in (*found, *copies):
      source.require_float(name)
      shape = source.info(name).shape
      if shape != entry.tensor_shape:
        raise UserError(
            f'{source.where}: tensor {name!r} has shape {shape}, config.json wants '
            f'{entry.tensor_shape} (for {entry.ours} {entry.shape}): one of the two is wrong'
        )
    if not entry.shares:
      left -= {*found, *copies}
    matches.append(Match(entry, tuple(found), tuple(copies)))
  if missing:
    name, entry = missing[0]
    near = nearest(name, left)
    hint = f' (did you mean {near!r}?), found with shape {source.info(near).shape}' if near else ''
    raise UserError(
        f'{source.where}: tensor {name!r} of shape {entry.tensor_shape} is missing'
        f'{_more(missing)}{hint}: restore it, or correct config.json'
    )
  left = {name for name in left if not any(re.fullmatch(p, name) for p in ignored)}
  if left:
    _extra(entries, source, sorted(left))
  return tuple(matches)


def _extra(entries: Sequence[Entry], source: checkpoint.Checkpoint, left: list[str]) -> None:
  known = {n: e for e in entries for names in e.names for n in names}
  near = nearest(left[0], known)
  hint = f' (did you mean {near!r}?) of shape {known[near].tensor_shape}' if near else ''
  raise UserError(
      f'{source.where}: tensor {left[0]!r} of shape {source.info(left[0]).shape} has no place in '
      f'the model that config.json describes{_more(left)}{hint}: remove it, or correct '
      'config.json'
  )


def _more(names: Sequence) -> str:
  return f' (and {len(names) - 1} more)' if len(names) > 1 else ''


def stored_dtype(match: Match, source: checkpoint.Checkpoint) -> np.dtype:
  """The dtype of a leaf's tensors; float32 where a stack mixes them."""
  stored = {source.info(name).dtype for name in match.found}
  return stored.pop() if len(stored) == 1 else np.dtype(np.float32)


def read_part(
    match: Match, index: int, source: checkpoint.Checkpoint, dtype: np.dtype
) -> np.ndarray:
  """One foreign tensor as (index `index` of) our leaf.

  Raises:
    UserError: it holds NaN or infinity, also after the cast, or a copy of it differs.
  """
  name = match.found[index]
  array = source.read_row(name, index) if match.entry.rows else source.read(name)
  check_finite(array, name, source.where)
  for copy in match.copies:
    if not np.array_equal(array, source.read(copy)):
      raise UserError(
          f'{source.where}: {copy!r} differs from {name!r}, but moejax keeps one matrix for both: '
          'make them equal, or set tie_word_embeddings in config.json as the model was trained'
      )
  if dtype != array.dtype:
    with np.errstate(over='ignore'):
      cast = array.astype(dtype)
    if not np.isfinite(cast).all():
      raise UserError(
          f'{source.where}: tensor {name!r} reaches {np.abs(array).max():.4g}, too large for '
          f'{dtype}: convert to bfloat16 or float32'
      )
    array = cast
  return match.entry.to_ours(array)


def read(match: Match, source: checkpoint.Checkpoint, dtype: np.dtype | None = None) -> Chunked:
  """Our leaf for a match, read tensor by tensor when its chunks are asked for; see `read_part`."""
  kind = dtype or stored_dtype(match, source)

  def chunks() -> Iterator[np.ndarray]:
    for index in range(len(match.found)):
      yield read_part(match, index, source, kind)

  return Chunked(match.entry.shape, kind, chunks)
