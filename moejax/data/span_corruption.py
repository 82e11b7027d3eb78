"""T5 span corruption: spans of the text become sentinels, and the target spells the spans out.

arXiv 1910.10683, section 3.1.4 and table 3: noise density 0.15, mean span length 3. Pure NumPy with
an explicit generator. Lengths are static: `tokens_length` picks how much raw text fills an encoder
sequence of a given length exactly, so that full samples carry no padding.
"""

import dataclasses

import numpy as np

from moejax import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
  """Static lengths in tokens: raw text in, encoder sequence and targets out (both with EOS)."""

  tokens: int
  inputs: int
  targets: int
  spans: int


def noise_counts(length: int, noise_density: float, mean_span: float) -> tuple[int, int]:
  """Returns (noise tokens, noise spans) for a text of `length` tokens (arXiv 1910.10683, 3.1.4).

  Both are at least 1; at least one token stays clean when `length` is over 1.
  """
  if length < 2:
    return length, length
  noise = min(max(int(np.round(length * noise_density)), 1), length - 1)
  spans = max(int(np.round(min(noise, length - noise) / mean_span)), 1)
  return noise, min(spans, noise, length - noise)


def lengths_for(inputs_length: int, noise_density: float = 0.15, mean_span: float = 3.0) -> Lengths:
  """Returns the longest raw text whose corrupted form fits `inputs_length` encoder tokens.

  A sample of n tokens with u noise tokens in k spans becomes n - u + k + 1 encoder tokens and
  u + k + 1 target tokens; the 1 is the end-of-sequence token.

  Raises:
    UserError: `inputs_length` is under 3, or the density or span is out of range.
  """
  if not 0.0 < noise_density < 1.0 or mean_span < 1.0:
    raise errors.UserError(
        f'span corruption wants 0 < noise_density < 1 and mean_span >= 1, got {noise_density} and '
        f'{mean_span}; set data.noise_density and data.mean_span'
    )
  if inputs_length < 3:
    raise errors.UserError(f'data.encoder_length = {inputs_length}: at least 3')

  def corrupted(length: int) -> tuple[int, int, int]:
    noise, spans = noise_counts(length, noise_density, mean_span)
    return length - noise + spans + 1, noise + spans + 1, spans

  length = 2
  while corrupted(length + 1)[0] <= inputs_length:
    length += 1
  targets = max(corrupted(n)[1] for n in range(1, length + 1))
  return Lengths(
      tokens=length, inputs=inputs_length, targets=targets, spans=corrupted(length)[2]
  )


def _segment_lengths(rng: np.random.Generator, items: int, segments: int) -> np.ndarray:
  """Returns `segments` positive lengths with sum `items`, every composition equally likely."""
  cuts = np.sort(rng.choice(items - 1, segments - 1, replace=False)) + 1
  return np.diff(np.concatenate(([0], cuts, [items])))


def noise_mask(
    rng: np.random.Generator, length: int, noise_density: float = 0.15, mean_span: float = 3.0
) -> np.ndarray:
  """Samples a bool mask [length], True = noise; clean and noise spans alternate, clean first.

  arXiv 1910.10683, section 3.1.4. A text of one token is all noise.
  """
  noise, spans = noise_counts(length, noise_density, mean_span)
  if length < 2:
    return np.ones(length, bool)
  runs = np.empty(2 * spans, np.int64)
  runs[0::2] = _segment_lengths(rng, length - noise, spans)
  runs[1::2] = _segment_lengths(rng, noise, spans)
  return np.repeat(np.arange(2 * spans) % 2 == 1, runs)


def apply_mask(
    tokens: np.ndarray, mask: np.ndarray, vocab_size: int, eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """Replaces noise spans by sentinels; the targets list each sentinel with the span it hides.

  arXiv 1910.10683, figure 2; sentinel k has id vocab_size - 1 - k. As in T5's own data, the
  targets end in EOS where the figure draws one more sentinel.

  Returns: (inputs, targets), both int32 and both ending in `eos_id`.
  """
  starts = mask & ~np.concatenate(([False], mask[:-1]))
  sentinels = (vocab_size - np.cumsum(starts)).astype(np.int32)
  inputs = np.where(starts, sentinels, tokens)[~mask | starts]
  order = np.flatnonzero(mask)
  targets = np.insert(tokens[order], np.flatnonzero(starts[order]), sentinels[starts])
  eos = np.array([eos_id], np.int32)
  return (
      np.concatenate((inputs, eos)).astype(np.int32),
      np.concatenate((targets, eos)).astype(np.int32),
  )


def corrupt(
    tokens: np.ndarray,
    rng: np.random.Generator,
    vocab_size: int,
    *,
    eos_id: int = 1,
    noise_density: float = 0.15,
    mean_span: float = 3.0,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (inputs, targets) of one text of int tokens [n]; see `noise_mask` and `apply_mask`."""
  mask = noise_mask(rng, len(tokens), noise_density, mean_span)
  return apply_mask(np.asarray(tokens), mask, vocab_size, eos_id)


def restore(inputs: np.ndarray, targets: np.ndarray, vocab_size: int, spans: int) -> np.ndarray:
  """Inverts `apply_mask`: puts the spans of `targets` back in the place of their sentinels.

  Args:
    inputs, targets: int arrays that end in EOS.
    spans: number of sentinels in use, so ids >= vocab_size - spans are sentinels.
  """
  first = vocab_size - spans
  hidden: dict[int, list[int]] = {}
  current: list[int] = []
  for token in targets[:-1].tolist():
    if token >= first:
      current = hidden.setdefault(token, [])
    else:
      current.append(token)
  out: list[int] = []
  for token in inputs[:-1].tolist():
    out.extend(hidden[token] if token >= first else [token])
  return np.array(out, np.int32)


def qmoe_noise_mask(
    rng: np.random.RandomState, length: int, noise_density: float = 0.15, mean_span: float = 3.0
) -> np.ndarray:
  """Samples the mask with the random calls of the QMoE reference (arXiv 2310.16795).

  Same distribution as `noise_mask`, but it shuffles bool vectors of cut points with a legacy
  generator, noise first, so the reference's calibration set comes out bit for bit.
  """
  noise = min(max(int(np.round(length * noise_density)), 1), length - 1)
  spans = max(int(np.round(min(noise, length - noise) / mean_span)), 1)

  def segment_lengths(items: int) -> np.ndarray:
    cuts = np.arange(items - 1) < spans - 1
    rng.shuffle(cuts)
    return np.bincount(np.cumsum(np.concatenate(([False], cuts))))

  runs = np.empty(2 * spans, np.int64)
  runs[1::2] = segment_lengths(noise)
  runs[0::2] = segment_lengths(length - noise)
  return np.repeat(np.arange(2 * spans) % 2 == 1, runs)


def qmoe_corrupt(
    tokens: np.ndarray, rng: np.random.RandomState, *, vocab_size: int = 32100, eos_id: int = 1
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (encoder tokens, decoder tokens) as the QMoE reference makes them.

  Differs from `corrupt` in two ways: the decoder side is the decoder's input (a leading 0), and it
  ends in one more sentinel, as in figure 2 of arXiv 1910.10683, with no EOS.

  Args:
    tokens: int [n], the document with its own EOS.
    rng: `np.random.RandomState(0)`, made anew for the calibration and for the validation pass.
  """
  mask = qmoe_noise_mask(rng, len(tokens))
  inputs, targets = apply_mask(tokens, mask, vocab_size, eos_id)
  spans = int(np.sum(mask[1:] & ~mask[:-1])) + int(mask[0])
  last = np.array([vocab_size - 1 - spans], np.int32)
  return inputs, np.concatenate((np.zeros(1, np.int32), targets[:-1], last))
