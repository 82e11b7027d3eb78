"""Choice of the grid of each matrix: range and threshold of least error, within a budget of bits.

QMoE takes the full range and rounds at half. GPTQ on a sample of the outputs tells what another
range and threshold would give: more zeros (so fewer bits) or less output error. Narrow ranges and
high thresholds also make the output smaller, which counts extra (see `refit_core`).
"""

from collections.abc import Sequence
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.compress import gptq_core, grids_core, hessian_core, refit_core

SCALES = (1.0, 0.85, 0.7)
THRESHOLDS = (0.5, 0.55, 0.6, 0.65)


class Tried(NamedTuple):
  """What c grids gave on samples of e matrices; float32.

  grid_scale, threshold: [c]. zeros: share of zeros, [c, e]. error: relative output error, and
  gain_weight times the square of the share of the output that is missing, [c, e].
  """

  grid_scale: np.ndarray
  threshold: np.ndarray
  zeros: np.ndarray
  error: np.ndarray


def try_grids(
    w_edf: jax.Array, h_edd: jax.Array, *, bits: str | int = 'ternary',
    scales: Sequence[float] = SCALES, thresholds: Sequence[float] = THRESHOLDS,
    outputs: int = 64, damping: float = 0.1, block_size: int = 128, refit: bool = True,
    ridge: float = 0.1, gain_weight: float = 0.0, level_dtype: Any = jnp.bfloat16,
    symmetric: bool = False, act_order: bool = False, rounding: bool = False,
) -> Tried:
  """Tries each (range, threshold) on evenly spread outputs of each matrix.

  Args:
    w_edf, h_edd: weights and undamped Hessians.
    bits: 'ternary'; with 2, 3, 4 only the range is varied.
    outputs: how many outputs a matrix is sampled at.
    damping, block_size, refit, ridge, gain_weight, level_dtype, symmetric, act_order: as the
      quantization to come. rounding: it will be RTN.
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
        w, h_edd, q, ridge=ridge, gain_weight=gain_weight, level_dtype=level_dtype, enabled=refit
    )
    zeros.append(np.asarray((q.symbols == 0).mean(axis=(1, 2))))
    missing = np.asarray(fit.gain_error.sum(1)) / total
    errors.append(np.asarray(fit.error_after.sum(1)) / total + gain_weight * missing**2)
  scale_c, threshold_c = np.asarray(tried, np.float32).T
  return Tried(scale_c, threshold_c, np.stack(zeros), np.stack(errors))


def choose(
    error_cn: np.ndarray, bits_cn: np.ndarray, size_n: np.ndarray, target_bits: float | None
) -> np.ndarray:
  """The grid of each of n matrices, int [n]: the least sum of errors within a budget for all.

  Args:
    error_cn, bits_cn: relative output error and bits a weight of each grid.
    size_n: weights of each matrix.
    target_bits: bits a weight of all matrices together, kept wherever the fewest bits of each keep
      it; None for no bound.

  A price of bits weighs them against error; the least price that keeps the budget is found by
  bisection (Lagrange relaxation: best for the bits it takes).
  """
  share_n = np.asarray(size_n, np.float64) / np.sum(size_n)
  at = np.arange(error_cn.shape[1])
  bits_cn = np.asarray(bits_cn, np.float64)
  error_cn = np.where(np.isfinite(error_cn), error_cn, 1e30)
  fewest = bits_cn.argmin(0)
  pick = error_cn.argmin(0)
  spent = lambda pick: bits_cn[pick, at] @ share_n
  if target_bits is None or spent(pick) <= target_bits:
    return pick
  pick, low, high = fewest, -60.0, 60.0
  for _ in range(80):
    middle = (low + high) / 2
    tried = (error_cn + 2.0**middle * bits_cn * share_n).argmin(0)
    if spent(tried) <= target_bits:
      pick, high = tried, middle
    else:
      low = middle
  return pick
