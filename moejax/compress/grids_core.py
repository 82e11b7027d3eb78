"""Quantization grids of QMoE (arXiv 2310.16795, section 3.1): ternary, 2, 3, 4, 8 bit, per output.

Weights lie as `w_edf`: experts, inputs of the matrix, outputs of the matrix. An output is what the
paper calls a row; each has one grid, found from the largest and smallest of its d weights.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from moejax.errors import UserError

BITS = ('ternary', 2, 3, 4, 8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TernaryGrid:
  """Levels {low, 0, high}; x > threshold * high rounds to high, x < threshold * low to low.

  Symbols: 0 zero, 1 low, 2 high. An exact tie rounds to 0. threshold broadcasts against low.
  """

  low: Any
  high: Any
  threshold: Any

  def symbols(self, x: jax.Array) -> jax.Array:
    """Nearest symbols, uint8, of weights that broadcast against the levels."""
    one = jnp.where(x < self.threshold * self.low, 1, 0)
    return jnp.where(x > self.threshold * self.high, 2, one).astype(jnp.uint8)

  def values(self, symbols: jax.Array) -> jax.Array:
    """The levels that symbols stand for, float32."""
    zero = jnp.zeros_like(self.low)
    return jnp.where(symbols == 2, self.high, jnp.where(symbols == 1, self.low, zero))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AffineGrid:
  """Levels scale * (symbol - zero), symbol = 0..max_symbol; rounding is half to even.

  zero is a whole number stored as float32, so 0 is always a level.
  """

  scale: Any
  zero: Any
  max_symbol: int = dataclasses.field(metadata={'static': True})

  def symbols(self, x: jax.Array) -> jax.Array:
    """Nearest symbols, uint8, of weights that broadcast against the levels."""
    # A full-size divisor: XLA turns division by a broadcast into a product, and ties go astray.
    scale = jnp.where(x == x, self.scale, 1.0)
    return jnp.clip(jnp.round(x / scale) + self.zero, 0, self.max_symbol).astype(jnp.uint8)

  def values(self, symbols: jax.Array) -> jax.Array:
    """The levels that symbols stand for, float32."""
    return self.scale * (symbols.astype(jnp.float32) - self.zero)


Grid = TernaryGrid | AffineGrid


def find_grid(
    w_edf: jax.Array, bits: str | int, *, symmetric: bool = False,
    grid_scale: Any = 1.0, threshold: Any = 0.5,
) -> Grid:
  """The min/max grid of each output, over all inputs (the axis before the last).

  low = min(weights, 0), high = max(weights, 0), and (-1, 1) where both are 0, in float32; then
  both shrink by grid_scale. `symmetric` widens the range to (-m, m) with m the larger side, where
  there is a negative weight. Levels keep the inputs axis with length 1.

  Args:
    w_edf: [..., d, f] weights, any float dtype.
    bits: 'ternary', 2, 3, 4 or 8.
    symmetric: whether both sides share one magnitude.
    grid_scale: factor on the range, a number or an array that broadcasts to [..., 1, 1].
    threshold: the share of a ternary level over which a weight rounds to it, as grid_scale.

  Raises:
    UserError: bits is none of the above.
  """
  if bits not in BITS:
    raise UserError(f'bits = {bits!r}: one of {BITS}')
  return _find_grid(w_edf, grid_scale, threshold, bits=bits, symmetric=symmetric)


@functools.partial(jax.jit, static_argnames=('bits', 'symmetric'))
def _find_grid(w_edf, grid_scale, threshold, *, bits, symmetric):
  w = w_edf.astype(jnp.float32)
  low = jnp.minimum(jnp.min(w, axis=-2, keepdims=True), 0.0)
  high = jnp.maximum(jnp.max(w, axis=-2, keepdims=True), 0.0)
  if symmetric:
    high = jnp.maximum(jnp.abs(low), high)
    low = jnp.where(low < 0, -high, low)
  empty = (low == 0) & (high == 0)
  grid_scale = jnp.asarray(grid_scale, jnp.float32)
  if grid_scale.ndim < w.ndim:
    grid_scale = grid_scale.reshape(grid_scale.shape + (1,) * (w.ndim - grid_scale.ndim))
  low = jnp.where(empty, -1.0, low) * grid_scale
  high = jnp.where(empty, 1.0, high) * grid_scale
  if bits == 'ternary':
    threshold = jnp.asarray(threshold, jnp.float32)
    threshold = threshold.reshape(threshold.shape + (1,) * (w.ndim - threshold.ndim))
    return TernaryGrid(low=low, high=high, threshold=threshold)
  max_symbol = 2 ** int(bits) - 1
  # A divisor XLA cannot see through, and a barrier: rewritten divisions are off by an ulp.
  scale = (high - low) / jnp.where(high > low, float(max_symbol), 1.0)
  scale = jax.lax.optimization_barrier(scale)
  zero = jnp.full_like(scale, (max_symbol + 1) / 2) if symmetric else jnp.round(-low / scale)
  return AffineGrid(scale=scale, zero=zero, max_symbol=max_symbol)


def row_levels(grid: Grid) -> tuple[jax.Array, jax.Array]:
  """The two numbers stored for each output: (low, high), or (scale, zero)."""
  if isinstance(grid, TernaryGrid):
    return grid.low, grid.high
  return grid.scale, grid.zero
