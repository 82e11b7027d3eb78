"""Choice of the ternary grid of each matrix: range and threshold for a bit budget or least error.

QMoE takes the full range and rounds at half. A smaller range with a higher threshold has a better
trade of zeros (so bits) against output error; GPTQ on a sample of the outputs tells which.
"""

from collections.abc import Callable, Sequence
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.compress import gptq_core, grids_core, hessian_core, refit_core

SCALES = (1.0, 0.85, 0.7)
THRESHOLDS = (0.5, 0.55, 0.6, 0.65)


class Choice(NamedTuple):
  """For each of e matrices: the grid taken, and the zero share, bits a weight and relative output
  error that its sample of outputs had, float32 [e]."""

  grid_scale: np.ndarray
  threshold: np.ndarray
  zeros: np.ndarray
  bits: np.ndarray
  error: np.ndarray


def entropy(zero_share: np.ndarray) -> np.ndarray:
  """Bits of a ternary weight whose two signs are equally frequent."""
  p = np.clip(np.asarray(zero_share, np.float64), 1e-9, 1 - 1e-9)
  return -p * np.log2(p) - (1 - p) * np.log2((1 - p) / 2)


def search_grid(
    w_edf: jax.Array, h_edd: jax.Array, *, bits: str | int = 'ternary',
    target_bits: float | None = None, estimate: Callable[[np.ndarray], np.ndarray] = entropy,
    scales: Sequence[float] = SCALES, thresholds: Sequence[float] = THRESHOLDS,
    outputs: int = 64, damping: float = 0.1, block_size: int = 128, refit: bool = True,
    ridge: float = 0.1, level_dtype: Any = jnp.bfloat16, symmetric: bool = False,
    act_order: bool = False, rounding: bool = False,
) -> Choice:
  """Tries each (range, threshold) on evenly spread outputs of each matrix and keeps the best.

  Args:
    w_edf, h_edd: weights and undamped Hessians.
    bits: 'ternary'; with 2, 3, 4 only the range is searched and bits play no part.
    target_bits: the least error among grids of at most so many bits a weight; if there is none,
      the fewest bits. None: the least error.
    estimate: zero shares -> stored bits a weight.
    outputs: how many outputs a matrix is sampled at.
    damping, block_size, refit, ridge, level_dtype, symmetric, act_order: as the quantization to
      come. rounding: it will be RTN.
  """
  step = max(1, w_edf.shape[2] // outputs)
  w = w_edf[:, :, ::step][:, :, :outputs].astype(jnp.float32)
  if act_order:
    order = gptq_core.order_by_diagonal(h_edd)
    w, h_edd = gptq_core.permute_inputs(w, order), gptq_core.permute_hessian(h_edd, order)
  lam = gptq_core.damping_lambda(h_edd, damping)
  if rounding:
    r, failed = jnp.zeros(()), jnp.zeros((w.shape[0],), bool)
  else:
    r, failed = gptq_core.factor(h_edd, lam)
  total = np.maximum(np.asarray(hessian_core.quadratic(h_edd, w).sum(1)), 1e-30)
  if bits != 'ternary':
    thresholds = (0.5,)
  tried = list(itertools.product(scales, thresholds))
  zeros, errors = [], []
  for scale, threshold in tried:
    if rounding:
      q = gptq_core.rtn(w, bits, symmetric=symmetric, grid_scale=scale, threshold=threshold)
    else:
      grid = grids_core.find_grid(
          w, bits, symmetric=symmetric, grid_scale=scale, threshold=threshold
      )
      symbols, error = gptq_core.sweep_factored(w, r, grid, block_size=block_size)
      q = gptq_core.Quantized(symbols, grid, gptq_core.values_of(grid, symbols), error, failed, lam)
    fit = refit_core.refit(
        w, h_edd, q, ridge=ridge, level_dtype=level_dtype, enabled=refit
    )
    zeros.append(np.asarray((q.symbols == 0).mean(axis=(1, 2))))
    errors.append(np.asarray(fit.error_after.sum(1)) / total)
  zero_ce, error_ce = np.stack(zeros), np.stack(errors)
  bits_ce = np.asarray(estimate(zero_ce)) if bits == 'ternary' else np.full(zero_ce.shape, bits)
  score = error_ce.copy()
  if target_bits is not None and bits == 'ternary':
    over = bits_ce > target_bits
    score[over] = np.inf
    none = over.all(0)
    score[:, none] = bits_ce[:, none]
  best = score.argmin(0)
  at = np.arange(best.size)
  scale_c, threshold_c = np.asarray(tried, np.float32).T
  return Choice(
      scale_c[best], threshold_c[best], zero_ce[best, at].astype(np.float32),
      bits_ce[best, at].astype(np.float32), error_ce[best, at].astype(np.float32),
  )
