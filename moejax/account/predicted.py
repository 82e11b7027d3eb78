"""Compressed weights before they are made: nodes of ShapeDtypeStructs of the size to come.

2 to 4 bits are exact. Ternary codes depend on the share of zeros; at the right share the size is
within 1 % for symbols as independent as GPTQ leaves them. The share follows from a matrix's width,
since the levels are the largest weights of an output (`expected_zero_share`).
"""

import functools
import math
import statistics
from typing import Any

import jax
import ml_dtypes
import numpy as np

from moejax import weights
from moejax.codec import qmoe_v1, ternary

# What GPTQ takes from the zero share of rounding: QMoE's published shares (arXiv 2310.16795, table
# 3) and the demo's are met within 0.006.
_GPTQ_LOSS = 0.043
# Zero shares between multiples of this are interpolated.
_STEP = 0.001
_SAMPLE_WEIGHTS = 1 << 19


@functools.lru_cache(maxsize=256)
def expected_zero_share(cols: int, *, rounding: bool = False, threshold: float = 0.5) -> float:
  """Share of zeros of a ternary matrix with `cols` inputs, outputs taken as Gaussian.

  A weight under threshold times the largest of its output goes to 0: for independent Gaussian ones
  that share depends on their number alone.

  Args:
    rounding: plain rounding; GPTQ leaves fewer zeros.
    threshold: times the grid's scale.
  """
  normal, points = statistics.NormalDist(), 400
  largest = (
      normal.inv_cdf(((i + 0.5) / points) ** (1 / max(cols, 2))) for i in range(points)
  )
  outside = sum(normal.cdf(-threshold * max(x, 0.0)) for x in largest) / points
  return min(max(1 - 2 * outside - (0.0 if rounding else _GPTQ_LOSS), 0.0), 1.0)


@functools.lru_cache(maxsize=4096)
def _known_rate(step: int, rows: int, cols: int, storage: str) -> float:
  """Codewords a weight of independent symbols at the zero share step * _STEP."""
  share = round(step * _STEP, 6)
  if storage != 'qmoe_v1':
    return ternary.expected_words(share, rows, cols) / (rows * cols)
  rng = np.random.default_rng(0)
  symbols = rng.integers(1, 3, max(1, _SAMPLE_WEIGHTS // cols) * cols).astype(np.uint8)
  # Exactly the share of zeros: a random one would be off by more than the estimate may be.
  symbols[rng.permutation(symbols.size)[: round(share * symbols.size)]] = 0
  return qmoe_v1.encode(symbols.reshape(-1, cols))[0].size / symbols.size


def _codewords(zero_share: Any, rows: int, cols: int, storage: str) -> np.ndarray:
  """Codewords a weight of matrices [rows, cols], for one zero share or an array of them."""
  place = np.clip(np.asarray(zero_share, np.float64), 0.01, 0.998) / _STEP
  below = np.floor(place + 1e-9).astype(int)
  known = {
      i: _known_rate(i, rows, cols, storage) for i in np.unique([below, below + 1]).tolist()
  }
  rate = np.vectorize(known.__getitem__, otypes=[np.float64])
  return rate(below) + (place - below) * (rate(below + 1) - rate(below))


def _ternary(
    shape: tuple[int, int, int], words: int, storage: str, level_dtype: Any
) -> weights.WeightNode:
  e, cols, rows = shape
  like = jax.ShapeDtypeStruct
  levels, longest = like((e, rows, 2), level_dtype), -(-words // e)
  if storage == 'qmoe_v1':
    return weights.TernaryV1(
        words=like((words,), np.uint16), row_offsets=like((e, rows + 1), np.uint32),
        levels=levels, rows=rows, cols=cols, max_words=longest,
    )
  block_rows = ternary.default_block_rows(rows, cols)
  return weights.Ternary(
      words=like((1, words), np.uint16), offsets=like((e, -(-rows // block_rows) + 1), np.uint32),
      design=like((e,), np.uint8), levels=levels, rows=rows, cols=cols, block_rows=block_rows,
      max_words=longest, designs=(),
  )


def ternary_bits_per_weight(
    zero_share: Any, *, rows: int, cols: int, storage: str = 'moejax',
    level_dtype: Any = ml_dtypes.bfloat16,
) -> np.ndarray:
  """Bits a weight of ternary matrices of `rows` outputs and `cols` inputs, all metadata counted.

  Args:
    zero_share: share of zeros, a number or an array.
    storage: 'moejax' or 'qmoe_v1'; others count as moejax.
    level_dtype: of the two levels of an output.
  """
  metadata = _ternary((1, cols, rows), 0, storage, level_dtype).bits()
  return 16 * _codewords(zero_share, rows, cols, storage) + metadata / (rows * cols)


def ternary_node(
    shape: tuple[int, int, int], zero_share: float, *, storage: str = 'moejax',
    level_dtype: Any = ml_dtypes.bfloat16, target_bits: float | None = None,
) -> weights.WeightNode:
  """An abstract `Ternary` (storage 'qmoe_v1': `TernaryV1`) [e, d, f] of independent symbols.

  target_bits: bits a weight that a grid search is to take, all metadata counted; the zero share
    then follows from it.
  """
  _, cols, rows = shape
  size = math.prod(shape)
  if target_bits is None:
    words = round(size * float(_codewords(zero_share, rows, cols, storage)))
  else:
    room = size * target_bits - _ternary(shape, 0, storage, level_dtype).bits()
    words = max(int(room // 16), 0)
  return _ternary(shape, words, storage, level_dtype)


def low_rank_sparse_node(
    shape: tuple[int, int, int], rank: int, keep: float, dtype: Any = ml_dtypes.bfloat16
) -> weights.LowRankSparse:
  """An abstract `LowRankSparse` [e, d, f] whose experts keep round(keep * f) outputs each."""
  e, d, f = shape
  kept = max(round(keep * f), 1)
  like = jax.ShapeDtypeStruct
  return weights.LowRankSparse(
      left=like((e, d, rank), dtype), right=like((e, rank, f), dtype),
      kept=like((e, d, kept), dtype), index=like((e, kept), np.int32),
  )


def packed_node(
    shape: tuple[int, int, int], bits: int, *, group_size: int | None = None,
    level_dtype: Any = ml_dtypes.bfloat16,
) -> weights.WeightNode:
  """An abstract `Packed` [e, d, f] of 2, 3, 4 or 8 bits."""
  e, cols, rows = shape
  like = jax.ShapeDtypeStruct
  levels = like((e, rows, -(-cols // group_size) if group_size else 1), level_dtype)
  return weights.Packed(
      words=like((e, weights.Packed.words_per_column(cols, bits), rows), np.uint32), scale=levels,
      zero=levels, cols=cols, width=bits, group_size=group_size or 0,
  )
