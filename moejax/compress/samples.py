"""Calibration and validation samples as flat token buffers, and how they are batched."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
from typing import Any

import numpy as np

from moejax.config import ModelConfig
from moejax.data import layout
from moejax.errors import UserError

_SHORTEST = 32
_BATCH_TOKENS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """One encoder-decoder pair without padding; `special_*` marks tokens left out of statistics."""

  encoder: np.ndarray
  decoder: np.ndarray
  targets: np.ndarray
  weights: np.ndarray
  special_encoder: np.ndarray
  special_decoder: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
  """Calibration samples first, then `validation` ones, which no statistic sees."""

  samples: tuple[Sample, ...]
  validation: int

  def lengths(self, stack: str) -> np.ndarray:
    """Tokens of each sample in 'encoder' or 'decoder'."""
    return np.array([len(getattr(s, stack)) for s in self.samples], np.int64)

  def calibration_tokens(self, stack: str) -> int:
    """Tokens before the validation tail."""
    return int(self.lengths(stack)[: len(self.samples) - self.validation].sum())

  def special(self, stack: str) -> np.ndarray:
    """The special marks of all tokens of a stack, in order."""
    return np.concatenate([getattr(s, f'special_{stack}') for s in self.samples])

  def fingerprint(self) -> str:
    """SHA-256 over every token and weight."""
    digest = hashlib.sha256(str(self.validation).encode())
    for sample in self.samples:
      for field in dataclasses.fields(sample):
        array = np.ascontiguousarray(getattr(sample, field.name))
        digest.update(str((array.shape, array.dtype)).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def collect(
    config: ModelConfig, batches: Iterable[Mapping[str, Any]],
    validation_batches: Iterable[Mapping[str, Any]] = (), *, sentinel: int | None = None,
) -> Samples:
  """Takes padded batches apart.

  A batch has int tokens `encoder_tokens` [b, s], `decoder_tokens` and `targets` [b, t], and
  `weights` [b, t], 0 on padding; `decoder_mask` [b, t] says otherwise which positions are real.
  Special are sentinels in the encoder, and in the decoder positions whose target is a sentinel or
  has no weight (QMoE 3.2.4).

  Raises:
    UserError: no calibration sample, a missing field, or a token outside the vocabulary.
  """
  sentinel = layout.first_sentinel(config) if sentinel is None else sentinel
  calibration = [s for batch in batches for s in _split(config, batch, sentinel)]
  validation = [s for batch in validation_batches for s in _split(config, batch, sentinel)]
  if not calibration:
    raise UserError('calibration has no sample: give at least one batch with a real token')
  return Samples(samples=(*calibration, *validation), validation=len(validation))


def _split(config: ModelConfig, batch: Mapping[str, Any], sentinel: int) -> Iterator[Sample]:
  names = ('encoder_tokens', 'decoder_tokens', 'targets', 'weights')
  missing = [name for name in names if name not in batch]
  if missing:
    raise UserError(f'calibration batch lacks {missing[0]!r}; it needs {", ".join(names)}')
  encoder, decoder, targets, weights = (np.asarray(batch[name]) for name in names)
  for name, tokens in (('encoder_tokens', encoder), ('decoder_tokens', decoder)):
    if tokens.size and (tokens.min() < 0 or tokens.max() >= config.vocab_size):
      raise UserError(
          f'calibration {name} span {tokens.min()}..{tokens.max()}, the model knows '
          f'0..{config.vocab_size - 1}: use the tokenizer of the model'
      )
  real = np.asarray(batch['decoder_mask']) if 'decoder_mask' in batch else weights > 0
  for i in range(len(encoder)):
    enc = encoder[i][encoder[i] != config.pad_id].astype(np.int32)
    keep = real[i].astype(bool)
    if not enc.size or not keep.any():
      continue
    target, weight = targets[i][keep].astype(np.int32), weights[i][keep].astype(np.float32)
    yield Sample(
        encoder=enc, decoder=decoder[i][keep].astype(np.int32), targets=target, weights=weight,
        special_encoder=enc >= sentinel, special_decoder=(target >= sentinel) | (weight == 0),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """Rows of flat token buffers as one padded batch: index [b, t], -1 for padding."""

  samples: np.ndarray
  encoder: np.ndarray
  decoder: np.ndarray


def _padded(length: int) -> int:
  if length <= 512:
    return max(_SHORTEST, 1 << (length - 1).bit_length())
  return -(-length // 512) * 512


def batches(samples: Samples, batch_tokens: int = _BATCH_TOKENS) -> list[Batch]:
  """Samples of like padded lengths together, in a few static shapes."""
  lengths = {stack: samples.lengths(stack) for stack in ('encoder', 'decoder')}
  starts = {stack: np.cumsum(n) - n for stack, n in lengths.items()}
  by_shape: dict[tuple[int, int], list[int]] = {}
  for i in range(len(samples.samples)):
    shape = (_padded(int(lengths['encoder'][i])), _padded(int(lengths['decoder'][i])))
    by_shape.setdefault(shape, []).append(i)
  out = []
  for shape, members in sorted(by_shape.items()):
    size = max(1, min(batch_tokens // max(shape), 1 << (len(members) - 1).bit_length()))
    for at in range(0, len(members), size):
      ids = members[at : at + size]
      index = {
          stack: _index(starts[stack], lengths[stack], ids, size, width)
          for stack, width in zip(('encoder', 'decoder'), shape)
      }
      out.append(Batch(samples=np.array(ids), **index))
  return out


def _index(
    starts: np.ndarray, lengths: np.ndarray, ids: Sequence[int], rows: int, width: int
) -> np.ndarray:
  index = np.full((rows, width), -1, np.int64)
  for row, i in enumerate(ids):
    index[row, : lengths[i]] = np.arange(starts[i], starts[i] + lengths[i])
  return index
