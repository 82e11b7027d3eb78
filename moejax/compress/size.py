"""Stored size of compressed experts from shapes alone."""

import functools
from typing import Any

import numpy as np

from moejax.codec import packing, qmoe_v1, ternary
from moejax.codec.ternary import default_block_rows

_SAMPLE_WEIGHTS = 1 << 19
# Zero shares between multiples of this are interpolated.
_STEP = 0.01


@functools.lru_cache(maxsize=4096)
def _payload(zero_share: float, rows: int, cols: int, storage: str) -> float:
  """Codeword bits a weight of independent symbols, measured by coding some."""
  rng = np.random.default_rng(0)
  sample = max(1, min(rows, _SAMPLE_WEIGHTS // cols))
  matrices = max(1, _SAMPLE_WEIGHTS // (sample * cols))
  # Exactly the share of zeros: a random one would be off by more than the estimate may be.
  count = matrices * sample * cols
  symbols = rng.integers(1, 3, count).astype(np.uint8)
  symbols[rng.permutation(count)[: round(zero_share * count)]] = 0
  if storage == 'qmoe_v1':
    return 16 * qmoe_v1.encode(symbols.reshape(-1, cols))[0].size / count
  block = min(default_block_rows(rows, cols), sample)
  coded = ternary.encode(symbols.reshape(matrices, sample, cols), block_rows=block)
  return 16 * coded.words_w.size / count


def ternary_bits_per_weight(
    zero_share: Any, *, rows: int, cols: int, storage: str = 'moejax', level_bits: int = 16
) -> np.ndarray:
  """Bits a weight of ternary matrices of `rows` outputs and `cols` inputs, all metadata counted.

  Args:
    zero_share: share of zeros, a number or an array.
    storage: 'moejax' or 'qmoe_v1' ('dense' counts as moejax).
    level_bits: bits of each of the two levels of an output.
  """
  shares = np.clip(np.asarray(zero_share, np.float64), 0.02, 0.98)
  below = np.floor(shares / _STEP)
  known = {
      i: _payload(round(_STEP * i, 6), rows, cols, storage)
      for i in np.unique([below, below + 1])
  }
  rate = np.vectorize(known.__getitem__, otypes=[np.float64])
  part = shares / _STEP - below
  payload = (1 - part) * rate(below) + part * rate(below + 1)
  weights = rows * cols
  if storage == 'qmoe_v1':
    return payload + (2 * level_bits * rows + 32 * (rows + 1)) / weights
  blocks = -(-rows // default_block_rows(rows, cols))
  return payload + (2 * level_bits * rows + 32 * (blocks + 1) + 8) / weights


def packed_bits_per_weight(
    bits: int, *, rows: int, cols: int, group_size: int | None = None, level_bits: int = 16
) -> float:
  """Bits a weight of 2- to 4-bit matrices, all metadata counted; exact."""
  groups = -(-cols // group_size) if group_size else 1
  words = packing.words_per_row(cols, bits)
  return (32 * words + 2 * level_bits * groups) / cols
