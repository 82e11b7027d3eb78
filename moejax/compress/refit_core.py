"""Levels refitted after GPTQ: least squares in the Hessian's metric with the symbols fixed.

Not in the QMoE paper; it costs no bits. Each output has two numbers, so two basis vectors over
its inputs: where the symbol is low, and where it is high (ternary); or the symbol itself, and ones
(2 to 4 bit). The normal equations are 2x2.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.compress import gptq_core, grids_core

# Below this share of the product of the diagonal a determinant counts as zero.
_SINGULAR = 1e-5


class Refit(NamedTuple):
  """levels: float32 [e, f, 2] that survive rounding to the stored dtype: (low, high), or
  (scale, zero). error_before, error_after: (w - q)^T H (w - q) of each output, [e, f]."""

  levels: jax.Array
  error_before: jax.Array
  error_after: jax.Array


def _coefficients(grid, levels):
  """Levels to the factors of the two basis vectors."""
  if isinstance(grid, grids_core.TernaryGrid):
    return levels
  scale, zero = levels
  return scale, -scale * zero


def _levels(grid, coefficients):
  """The inverse of `_coefficients`."""
  if isinstance(grid, grids_core.TernaryGrid):
    return coefficients
  a, b = coefficients
  return a, -b / jnp.where(a == 0, 1.0, a)


def _basis(grid, symbols):
  if isinstance(grid, grids_core.TernaryGrid):
    return (symbols == 1).astype(jnp.float32), (symbols == 2).astype(jnp.float32)
  return symbols.astype(jnp.float32), jnp.ones(symbols.shape, jnp.float32)


def _candidates(normal, target):
  """Changes of the two coefficients: both, the first alone, the second alone; 0 if degenerate."""
  (g11, g12, g22), (c1, c2) = normal, target
  det = g11 * g22 - g12 * g12
  solvable = det > _SINGULAR * g11 * g22
  safe = jnp.where(solvable, det, 1.0)
  both = (
      jnp.where(solvable, (g22 * c1 - g12 * c2) / safe, 0.0),
      jnp.where(solvable, (g11 * c2 - g12 * c1) / safe, 0.0),
  )
  zero = jnp.zeros_like(c1)
  first = jnp.where(g11 > 0, c1 / jnp.where(g11 > 0, g11, 1.0), 0.0)
  second = jnp.where(g22 > 0, c2 / jnp.where(g22 > 0, g22, 1.0), 0.0)
  return [both, (first, zero), (zero, second)]


def _valid(grid, levels):
  if isinstance(grid, grids_core.TernaryGrid):
    return (levels[0] <= 0) & (levels[1] >= 0)
  return levels[0] > 0


def _refit_one(w, h, symbols, error, ridge, grid, dtype, enabled):
  """One expert; w [d, f], h [d, d], error [f], levels of grid [1, f]."""
  rounded = lambda pair: tuple(a.astype(dtype).astype(jnp.float32) for a in pair)
  start = _coefficients(grid, tuple(a[0] for a in grids_core.row_levels(grid)))
  basis = _basis(grid, symbols)
  finite = jnp.where(jnp.isfinite(h), h, 0.0)
  images = [jnp.matmul(finite, b, precision='highest') for b in basis]
  diff = w - start[0][None] * basis[0] - start[1][None] * basis[1]
  dot = lambda a, b: jnp.sum(a * b, axis=0)
  gram = dot(basis[0], images[0]), dot(basis[0], images[1]), dot(basis[1], images[1])
  target = dot(images[0], diff), dot(images[1], diff)
  counts = dot(basis[0], basis[0]), dot(basis[0], basis[1]), dot(basis[1], basis[1])
  ridged = tuple(g + ridge * n for g, n in zip(gram, counts))
  ridged_target = tuple(c + ridge * dot(b, diff) for c, b in zip(target, basis))

  def change(x):
    return (
        -2 * (x[0] * target[0] + x[1] * target[1])
        + x[0] ** 2 * gram[0] + 2 * x[0] * x[1] * gram[1] + x[1] ** 2 * gram[2]
    )

  def stored(step):
    levels = rounded(_levels(grid, (start[0] + step[0], start[1] + step[1])))
    moved = _coefficients(grid, levels)
    return levels, change((moved[0] - start[0], moved[1] - start[1]))

  zero = jnp.zeros_like(start[0])
  best_levels, base = stored((zero, zero))
  gain = zero
  before = jnp.maximum(error + base, 0.0)
  for step in _candidates(ridged, ridged_target) if enabled else ():
    levels, value = stored(step)
    better = (value - base < gain) & _valid(grid, levels)
    gain = jnp.where(better, value - base, gain)
    best_levels = tuple(jnp.where(better, a, b) for a, b in zip(levels, best_levels))
  return jnp.stack(best_levels, axis=-1), before, gain


def refit(
    w_edf: jax.Array, h_edd: jax.Array, quantized: gptq_core.Quantized, *, ridge: float = 0.1,
    level_dtype: Any = jnp.bfloat16, enabled: bool = True,
) -> Refit:
  """The levels of least output error for the symbols GPTQ chose, in a stored dtype.

  Solved under H + ridge * mean(diag H) I, so that an expert with few tokens keeps near its weights;
  taken only where the rounded levels lower (w - q)^T H (w - q) itself. A degenerate row (no symbol,
  or one the tokens never touch) keeps its levels.

  Args:
    w_edf: weights; h_edd: Hessians, undamped; quantized: of these, with one grid an output.
    ridge: see above.
    level_dtype: the dtype levels are stored in.
    enabled: False only rounds the levels and accounts for the error.
  """
  levels, before, gain = _refit(
      w_edf, h_edd, quantized, ridge, level_dtype=level_dtype, enabled=enabled
  )
  return Refit(levels, before, jnp.maximum(before + gain, 0.0))


@functools.partial(jax.jit, static_argnames=('level_dtype', 'enabled'))
def _refit(w_edf, h_edd, quantized, ridge, *, level_dtype, enabled):
  w = w_edf.astype(jnp.float32)
  # (w - q)^T (H + lambda I) (w - q) is known; rounding (H = I) knows only |w - q|^2.
  squares = jnp.sum((w - quantized.values) ** 2, axis=1)
  known = quantized.damped_error - quantized.damping[:, None] * squares

  def one(args):
    w, h, symbols, values, known, simple, grid = args
    exact = lambda: jnp.sum(
        (w - values) * jnp.matmul(h, w - values, precision='highest'), axis=0
    )
    error = jax.lax.cond(simple, exact, lambda: known)
    mean = jnp.mean(jnp.diagonal(h))
    return _refit_one(w, h, symbols, error, ridge * mean, grid, level_dtype, enabled)

  simple = quantized.fallback | (quantized.damping == 0)
  grid = quantized.grid
  if isinstance(grid, grids_core.TernaryGrid):
    grid = grids_core.TernaryGrid(
        low=grid.low, high=grid.high, threshold=jnp.zeros((w.shape[0],), jnp.float32)
    )
  return jax.lax.map(
      one, (w, h_edd, quantized.symbols, quantized.values, known, simple, grid)
  )
