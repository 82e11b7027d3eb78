"""Words to guess from both sides: BERT's masked language modelling (arXiv 1810.04805, 3.1)."""

import dataclasses

import numpy as np

from moejax.data.batches import Batch
from moejax.data.packing import LmBatches

_MASK = 3  # random stream, beside those of packing
_HIDDEN, _CHANGED = 0.8, 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedBatches(LmBatches):
  """Packed batches some of whose words are to be guessed.

  `targets` are the words themselves and `weights` 1 where one is to be guessed: noise_density of
  them, of which 80 % read mask_id, 10 % a random id and 10 % themselves. What is masked differs by
  row and epoch; with `fixed` it is the same on every call. Ends of texts are never masked.
  """

  mask_id: int
  vocab_size: int
  noise_density: float = 0.15

  def row(self, index: int) -> Batch:
    row = super().row(index)
    return masked(
        row, mask_id=self.mask_id, vocab_size=self.vocab_size, density=self.noise_density,
        keep=(self.eos_id,), rng=np.random.default_rng([self.seed, _MASK, index]),
    )


def masked(
    row: Batch, *, mask_id: int, vocab_size: int, density: float, rng: np.random.Generator,
    keep: tuple[int, ...] = (),
) -> Batch:
  """A row {'tokens', 'segments' int32 [t], ...} with words masked; `keep`: ids that never are."""
  tokens, length = row['tokens'], len(row['tokens'])
  real = (row['segments'] > 0) & ~np.isin(tokens, keep)
  chosen = real & (rng.random(length) < density)
  how, other = rng.random(length), rng.integers(0, vocab_size, length, dtype=np.int32)
  read = np.where(how < _HIDDEN, np.int32(mask_id), tokens)
  read = np.where((how >= _HIDDEN) & (how < _HIDDEN + _CHANGED), other, read)
  return {
      **row, 'tokens': np.where(chosen, read, tokens).astype(np.int32), 'targets': tokens,
      'weights': chosen.astype(np.float32),
  }
