"""Calibration and validation samples as flat token buffers, and how they are batched."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
from typing import Any

import numpy as np

from moejax.config import EncDecConfig, ModelConfig, StackConfig
from moejax.data import layout
from moejax.errors import UserError

_SHORTEST = 32
_BATCH_TOKENS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """One text without padding, int and bool [t] by stack ('encoder', 'decoder').

  tokens: what each stack reads. special: tokens left out of statistics. targets, weights: of the
  last stack's positions.
  """

  tokens: Mapping[str, np.ndarray]
  special: Mapping[str, np.ndarray]
  targets: np.ndarray
  weights: np.ndarray

  def arrays(self) -> Iterator[np.ndarray]:
    """Every array, in an order of its own."""
    for stack in sorted(self.tokens):
      yield from (self.tokens[stack], self.special[stack])
    yield from (self.targets, self.weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
  """Calibration samples first, then `validation` ones, which no statistic sees."""

  samples: tuple[Sample, ...]
  validation: int

  def lengths(self, stack: str) -> np.ndarray:
    """Tokens of each sample in a stack."""
    return np.array([len(s.tokens[stack]) for s in self.samples], np.int64)

  def calibration_tokens(self, stack: str) -> int:
    """Tokens before the validation tail."""
    return int(self.lengths(stack)[: len(self.samples) - self.validation].sum())

  def special(self, stack: str) -> np.ndarray:
    """The special marks of all tokens of a stack, in order."""
    return np.concatenate([s.special[stack] for s in self.samples])

  def tail(self) -> 'Samples':
    """The validation samples alone."""
    start = len(self.samples) - self.validation
    return dataclasses.replace(self, samples=self.samples[start:])

  def fingerprint(self) -> str:
    """SHA-256 over every token and weight."""
    digest = hashlib.sha256(str(self.validation).encode())
    for sample in self.samples:
      for array in map(np.ascontiguousarray, sample.arrays()):
        digest.update(str((array.shape, array.dtype)).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def collect(
    config: ModelConfig, batches: Iterable[Mapping[str, Any]],
    validation_batches: Iterable[Mapping[str, Any]] = (), *, sentinel: int | None = None,
) -> Samples:
  """Takes padded batches apart.

  An encoder-decoder's batch has int tokens `encoder_tokens` [b, s], `decoder_tokens` and `targets`
  [b, t], and `weights` [b, t], 0 on padding; `decoder_mask` [b, t] says otherwise which positions
  are real. Special are sentinels in the encoder, and in the decoder positions whose target is a
  sentinel or has no weight (QMoE 3.2.4).

  A decoder's batch has `tokens` [b, t], and may have `targets`, `weights` and `segments` [b, t] as
  `data.packing` makes them; each packed document is a sample. Nothing there is special. So does an
  encoder's, whose targets are its own words unless given, and whose kinds of tokens are all 0.

  Raises:
    UserError: no calibration sample, a missing or misshapen field, or a token outside the
      vocabulary.
  """
  if isinstance(config, StackConfig):
    split = lambda batch: _documents(config, batch)
  else:
    first = layout.first_sentinel(config) if sentinel is None else sentinel
    split = lambda batch: _pairs(config, batch, first)
  calibration = [s for batch in batches for s in split(batch)]
  validation = [s for batch in validation_batches for s in split(batch)]
  if not calibration:
    raise UserError('calibration has no sample: give at least one batch with a real token')
  return Samples(samples=(*calibration, *validation), validation=len(validation))


def _fields(
    config: ModelConfig, batch: Mapping[str, Any], names: Sequence[str], tokens: Sequence[str]
) -> list[np.ndarray]:
  """The named arrays of a batch, checked: there, two axes, one batch size, ids in range."""
  missing = [name for name in names if name not in batch]
  if missing:
    raise UserError(f'calibration batch lacks {missing[0]!r}; it needs {", ".join(names)}')
  found = [np.asarray(batch[name]) for name in names]
  for name, array in zip(names, found):
    if array.ndim != 2 or len(array) != len(found[0]):
      raise UserError(
          f'calibration {name} has shape {array.shape}: [batch, length] with the batch size of '
          f'{names[0]}, {len(found[0])}, is needed'
      )
    if name in tokens and not np.issubdtype(array.dtype, np.integer):
      raise UserError(f'calibration {name} is {array.dtype}: token ids are integers')
    if name in tokens and array.size and (array.min() < 0 or array.max() >= config.vocab_size):
      raise UserError(
          f'calibration {name} span {array.min()}..{array.max()}, the model knows '
          f'0..{config.vocab_size - 1}: use the tokenizer of the model'
      )
  return found


def _require_alike(names: Sequence[str], arrays: Sequence[np.ndarray]) -> None:
  for name, array in zip(names, arrays):
    if array.shape != arrays[0].shape:
      raise UserError(
          f'calibration {name} has shape {array.shape}, {names[0]} {arrays[0].shape}: make them '
          'alike'
      )


def _pairs(config: EncDecConfig, batch: Mapping[str, Any], sentinel: int) -> Iterator[Sample]:
  names = ('encoder_tokens', 'decoder_tokens', 'targets', 'weights')
  encoder, decoder, targets, weights = _fields(config, batch, names, names[:3])
  _require_alike(names[1:], (decoder, targets, weights))
  real = np.asarray(batch['decoder_mask']) if 'decoder_mask' in batch else weights > 0
  for i in range(len(encoder)):
    enc = encoder[i][encoder[i] != config.pad_id].astype(np.int32)
    keep = real[i].astype(bool)
    if not enc.size or not keep.any():
      continue
    target, weight = targets[i][keep].astype(np.int32), weights[i][keep].astype(np.float32)
    yield Sample(
        tokens={'encoder': enc, 'decoder': decoder[i][keep].astype(np.int32)},
        special={'encoder': enc >= sentinel, 'decoder': (target >= sentinel) | (weight == 0)},
        targets=target, weights=weight,
    )


def _documents(config: StackConfig, batch: Mapping[str, Any]) -> Iterator[Sample]:
  names = ['tokens', *(n for n in ('targets', 'weights', 'segments') if n in batch)]
  arrays = dict(zip(names, _fields(config, batch, names, ('tokens', 'targets'))))
  _require_alike(names, list(arrays.values()))
  tokens = arrays['tokens']
  segments = arrays.get('segments', np.ones(tokens.shape, np.int32))
  targets = arrays.get('targets', np.roll(tokens, -1, 1) if config.causal else tokens)
  weights = arrays.get('weights')
  if weights is None and getattr(config, 'head', 'mlm') != 'mlm':
    weights = np.zeros(tokens.shape, np.float32)  # The words read are no labels.
  elif weights is None and not config.causal:
    weights = (segments > 0).astype(np.float32)
  elif weights is None:
    weights = (np.arange(tokens.shape[1]) < tokens.shape[1] - 1) * np.ones(tokens.shape, np.float32)
  for row in range(len(tokens)):
    for segment in np.unique(segments[row][segments[row] > 0]):
      own = segments[row] == segment
      yield Sample(
          tokens={config.stack: tokens[row][own].astype(np.int32)},
          special={config.stack: np.zeros(own.sum(), bool)},
          targets=targets[row][own].astype(np.int32),
          weights=weights[row][own].astype(np.float32),
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """Rows of flat token buffers as one padded batch: index [b, t] by stack, -1 for padding."""

  samples: np.ndarray
  index: Mapping[str, np.ndarray]


def padded(samples: Samples, rows: int) -> Iterator[dict[str, np.ndarray]]:
  """Calibration samples as padded batches of `rows`, in a few static lengths, as `collect` takes
  them; rows are filled up with padding, whose weights are 0."""
  own = Samples(
      samples=samples.samples[: len(samples.samples) - samples.validation], validation=0
  )
  stacks = tuple(own.samples[0].tokens)
  by_shape: dict[tuple[int, ...], list[Sample]] = {}
  for sample in own.samples:
    shape = tuple(_padded(len(sample.tokens[stack])) for stack in stacks)
    by_shape.setdefault(shape, []).append(sample)
  for shape, members in sorted(by_shape.items()):
    for at in range(0, len(members), rows):
      some = members[at : at + rows]
      fill = lambda arrays, width, dtype: _filled(arrays, rows, width, dtype)
      made = {
          stack: fill([s.tokens[stack] for s in some], width, np.int32)
          for stack, width in zip(stacks, shape)
      }
      width = shape[-1]
      out = {
          'targets': fill([s.targets for s in some], width, np.int32),
          'weights': fill([s.weights for s in some], width, np.float32),
      }
      if len(stacks) == 1:
        real = fill([np.ones(len(s.targets)) for s in some], width, np.int32)
        yield {**out, 'tokens': made[stacks[0]], 'segments': real}
      else:
        yield {**out, **{f'{stack}_tokens': a for stack, a in made.items()}}


def _filled(arrays: Sequence[np.ndarray], rows: int, width: int, dtype: Any) -> np.ndarray:
  out = np.zeros((rows, width), dtype)
  for row, a in enumerate(arrays):
    out[row, : len(a)] = a
  return out


def _padded(length: int) -> int:
  if length <= 512:
    return max(_SHORTEST, 1 << (length - 1).bit_length())
  return -(-length // 512) * 512


def batches(samples: Samples, batch_tokens: int = _BATCH_TOKENS) -> list[Batch]:
  """Samples of like padded lengths together, in a few static shapes."""
  stacks = tuple(samples.samples[0].tokens)
  lengths = {stack: samples.lengths(stack) for stack in stacks}
  starts = {stack: np.cumsum(n) - n for stack, n in lengths.items()}
  by_shape: dict[tuple[int, ...], list[int]] = {}
  for i in range(len(samples.samples)):
    shape = tuple(_padded(int(lengths[stack][i])) for stack in stacks)
    by_shape.setdefault(shape, []).append(i)
  out = []
  for shape, members in sorted(by_shape.items()):
    size = max(1, min(batch_tokens // max(shape), 1 << (len(members) - 1).bit_length()))
    for at in range(0, len(members), size):
      ids = members[at : at + size]
      index = {
          stack: _index(starts[stack], lengths[stack], ids, size, width)
          for stack, width in zip(stacks, shape)
      }
      out.append(Batch(samples=np.array(ids), index=index))
  return out


def _index(
    starts: np.ndarray, lengths: np.ndarray, ids: Sequence[int], rows: int, width: int
) -> np.ndarray:
  index = np.full((rows, width), -1, np.int64)
  for row, i in enumerate(ids):
    index[row, : lengths[i]] = np.arange(starts[i], starts[i] + lengths[i])
  return index
