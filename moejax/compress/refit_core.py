"""Levels refitted after GPTQ: least squares in the Hessian's metric with the symbols fixed.

Not in the QMoE paper; it costs no bits. Each output has two numbers, so two basis vectors over
its inputs: where the symbol is low, and where it is high (ternary); or the symbol itself, and ones
(2 to 4 bit). The normal equations are 2x2.

Least squares shrinks: what it fits is smaller than what it is fitted to. That error has the same
sign in every output, so the next matrix adds it up where it averages other errors out. The metric
H + gain_weight (H w)(H w)^T / (w^T H w) makes it count more.
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
  (scale, zero). error_before, error_after: (w - q)^T H (w - q) of each output, [e, f]. gain_error:
  w^T H (w - q), [e, f]; over w^T H w it is the share of the output that is missing."""

  levels: jax.Array
  error_before: jax.Array
  error_after: jax.Array
  gain_error: jax.Array


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


def _with_gain(gram, target, along, missing, weight):
  """The normal equations in a metric that has `weight` times the gain's direction added."""
  p, q = along
  gram = gram[0] + weight * p * p, gram[1] + weight * p * q, gram[2] + weight * q * q
  return gram, (target[0] + weight * p * missing, target[1] + weight * q * missing)


def _change(step, gram, target):
  """What a step of the two coefficients adds to the squared error."""
  x, y = step
  return -2 * (x * target[0] + y * target[1]) + x**2 * gram[0] + 2 * x * y * gram[1] + (
      y**2 * gram[2]
  )


def _refit_one(w, h, symbols, error, ridge, gain_weight, grid, dtype, enabled):
  """One expert; w [d, f], h [d, d], error [f], levels of grid [1, f]."""
  rounded = lambda pair: tuple(a.astype(dtype).astype(jnp.float32) for a in pair)
  start = _coefficients(grid, tuple(a[0] for a in grids_core.row_levels(grid)))
  basis = _basis(grid, symbols)
  finite = jnp.where(jnp.isfinite(h), h, 0.0)
  image_w, *images = (jnp.matmul(finite, a, precision='highest') for a in (w, *basis))
  diff = w - start[0][None] * basis[0] - start[1][None] * basis[1]
  dot = lambda a, b: jnp.sum(a * b, axis=0)
  norm = jnp.sqrt(jnp.maximum(dot(w, image_w), 1e-30))
  along, missing = tuple(dot(b, image_w) / norm for b in basis), dot(diff, image_w) / norm
  gram = dot(basis[0], images[0]), dot(basis[0], images[1]), dot(basis[1], images[1])
  target = dot(images[0], diff), dot(images[1], diff)
  gain_gram, gain_target = _with_gain(gram, target, along, missing, gain_weight)
  counts = dot(basis[0], basis[0]), dot(basis[0], basis[1]), dot(basis[1], basis[1])
  ridged = tuple(g + ridge * n for g, n in zip(gain_gram, counts))
  ridged_target = tuple(c + ridge * dot(b, diff) for c, b in zip(gain_target, basis))

  def stored(step):
    levels = rounded(_levels(grid, (start[0] + step[0], start[1] + step[1])))
    moved = _coefficients(grid, levels)
    moved = moved[0] - start[0], moved[1] - start[1]
    return levels, _change(moved, gram, target), _change(moved, gain_gram, gain_target), moved

  zero = jnp.zeros_like(start[0])
  best_levels, base, gain_base, best_step = stored((zero, zero))
  plain_gain, full_gain = zero, zero
  before = jnp.maximum(error + base, 0.0)
  for step in _candidates(ridged, ridged_target) if enabled else ():
    levels, plain, full, moved = stored(step)
    better = (full - gain_base < full_gain) & (plain <= base) & _valid(grid, levels)
    pick = lambda new, old: jnp.where(better, new, old)
    plain_gain, full_gain = pick(plain - base, plain_gain), pick(full - gain_base, full_gain)
    best_levels = tuple(map(pick, levels, best_levels))
    best_step = tuple(map(pick, moved, best_step))
  left = (missing - along[0] * best_step[0] - along[1] * best_step[1]) * norm
  return jnp.stack(best_levels, axis=-1), before, plain_gain, left


def refit(
    w_edf: jax.Array, h_edd: jax.Array, quantized: gptq_core.Quantized, *, ridge: float = 0.1,
    gain_weight: float = 0.0, level_dtype: Any = jnp.bfloat16, enabled: bool = True,
) -> Refit:
  """The levels of least output error for the symbols GPTQ chose, in a stored dtype.

  Solved under H + ridge * mean(diag H) I, so that an expert with few tokens keeps near its weights;
  taken only where the rounded levels lower the error in the metric with gain_weight and do not
  raise (w - q)^T H (w - q) itself. A degenerate row (no symbol, or one the tokens never touch)
  keeps its levels.

  Args:
    w_edf: weights; h_edd: Hessians, undamped; quantized: of these, with one grid an output.
    ridge: see above.
    gain_weight: how much more an error in proportion to the output counts; 0 is least squares.
    level_dtype: the dtype levels are stored in.
    enabled: False only rounds the levels and accounts for the error.
  """
  levels, before, gained, missing = _refit(
      w_edf, h_edd, quantized, ridge, gain_weight, level_dtype=level_dtype, enabled=enabled
  )
  return Refit(levels, before, jnp.maximum(before + gained, 0.0), missing)


@functools.partial(jax.jit, static_argnames=('level_dtype', 'enabled'))
def _refit(w_edf, h_edd, quantized, ridge, gain_weight, *, level_dtype, enabled):
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
    return _refit_one(
        w, h, symbols, error, ridge * mean, gain_weight, grid, level_dtype, enabled
    )

  simple = quantized.fallback | (quantized.damping == 0)
  grid = quantized.grid
  if isinstance(grid, grids_core.TernaryGrid):
    grid = grids_core.TernaryGrid(
        low=grid.low, high=grid.high, threshold=jnp.zeros((w.shape[0],), jnp.float32)
    )
  return jax.lax.map(
      one, (w, h_edd, quantized.symbols, quantized.values, known, simple, grid)
  )
