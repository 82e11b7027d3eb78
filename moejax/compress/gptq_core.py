"""Batched GPTQ (arXiv 2210.17323; QMoE, arXiv 2310.16795, section 3.2.2): arrays in, arrays out.

`w_edf` holds e matrices of d inputs and f outputs, `h_edd` their Hessians. One Cholesky
factorisation H + lambda I = R R^T, R upper triangular, drives the sweep over the inputs:

    q_j = grid(w~_j),   w~_j = w_j + sum_{k<j} (w_k - q_k) R_kj / R_jj.

In exact arithmetic this is GPTQ's recurrence (whose U, the Cholesky factor of the inverse with
(H + lambda I)^-1 = U^T U, is R^-1), without the inverse and without a second factorisation. The
sum of R_jj^2 (w~_j - q_j)^2 is the damped output error (w - q)^T (H + lambda I) (w - q), so that
comes for free. Blocks recurse: half of the inputs is swept, one matmul carries its differences to
the other half, and so on down to `block_size`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.compress import grids_core
from moejax.errors import UserError

# Inputs swept one by one between the small matmuls inside a block.
_SUB = 16
# Columns a step of the factorisation takes.
_FACTOR_BLOCK = 128

# Where float32 products default to fewer bits (TPU, TF32), symbols would leave the reference's.
_dot = functools.partial(jnp.matmul, precision='highest')
_einsum = functools.partial(jnp.einsum, precision='highest')


class Quantized(NamedTuple):
  """What GPTQ, or rounding, makes of e matrices.

  symbols: uint8 [e, d, f]. grid: its levels, [e, 1, f], or [e, groups, f] with groups of inputs.
  values: float32 [e, d, f], what the symbols stand for. damped_error: float32 [e, f],
  (w - q)^T (H + lambda I) (w - q) of each output. fallback: bool [e], True where H could not be
  factorised, so that the matrix was rounded. damping: float32 [e], lambda.
  """

  symbols: jax.Array
  grid: grids_core.Grid
  values: jax.Array
  damped_error: jax.Array
  fallback: jax.Array
  damping: jax.Array


@jax.jit
def damping_lambda(h_edd: jax.Array, damping: float) -> jax.Array:
  """lambda = max(damping * mean(diag H), 1e-6) of each expert, [e]."""
  diag = jnp.diagonal(h_edd, axis1=-2, axis2=-1)
  return jnp.maximum(damping * jnp.mean(diag, axis=-1), 1e-6)


def _upper_factor(a_dd: jax.Array) -> jax.Array:
  """Upper triangular R with a = R R^T, by block columns from the last to the first.

  LAPACK sees only the blocks on the diagonal: its threads and XLA's would fight for the cores.
  """
  d = a_dd.shape[0]
  r = jnp.zeros_like(a_dd)
  for start in reversed(range(0, d, _FACTOR_BLOCK)):
    end = min(start + _FACTOR_BLOCK, d)
    column = a_dd[:end, start:end]
    if end < d:
      column = column - _dot(r[:end, end:], r[start:end, end:].T)
    corner = column[start:end][::-1, ::-1]
    lower = jax.lax.linalg.cholesky(corner, symmetrize_input=False)
    eye = jnp.eye(end - start, dtype=a_dd.dtype)
    inverse = jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
    r = r.at[start:end, start:end].set(lower[::-1, ::-1])
    if start:
      r = r.at[:start, start:end].set(_dot(column[:start], inverse[::-1, ::-1].T))
  return r


@jax.jit
def factor(h_edd: jax.Array, lambda_e: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Upper triangular R with R R^T = H + lambda I, float32 [e, d, d], and bool [e]: it failed.

  An expert whose matrix is not positive definite, or not finite, gets R = I, which turns GPTQ into
  plain rounding; it does not touch the others. Inside, float64 on CPU and GPU, float32 on TPU.
  """

  # The pivots are small differences of large numbers. In float32 they cost five times the error of
  # the published order (which factors the inverse), enough to flip a symbol now and then.
  wide = jax.default_backend() != 'tpu'

  def one(h_dd, lam):
    d = h_dd.shape[-1]
    with jax.enable_x64(wide):
      eye = jnp.eye(d, dtype=jnp.float64 if wide else jnp.float32)
      r = _upper_factor(h_dd.astype(eye.dtype) + lam.astype(eye.dtype) * eye).astype(jnp.float32)
    good = jnp.all(jnp.isfinite(r)) & jnp.all(jnp.isfinite(h_dd))
    return jnp.where(good, r, jnp.eye(d, dtype=jnp.float32)), ~good

  return jax.lax.map(lambda pair: one(*pair), (h_edd, lambda_e))


@jax.jit
def feedback(r_edd: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(R_kj / R_jj for k < j, else 0; R_jj)."""
  diag = jnp.diagonal(r_edd, axis1=-2, axis2=-1)
  return jnp.triu(r_edd / diag[:, None, :], k=1), diag


def _at(a, i, axis):
  return jax.lax.dynamic_index_in_dim(a, i, axis, keepdims=False)


def sweep_block(carried_ebf, w_ebf, m_ebb, weight_eb, flat_grid):
  """Sweeps the inputs of one block in order; returns w - q, symbols, and the error by output.

  carried_ebf is w_ebf plus what earlier blocks carried to it. Loops, not unrolled columns: they are
  what keeps XLA from fusing each column's chain into all later ones.
  """
  e, size, f = w_ebf.shape
  sub = min(_SUB, size)
  pad = -size % sub
  carried_ebf, w_ebf = (jnp.pad(a, ((0, 0), (0, pad), (0, 0))) for a in (carried_ebf, w_ebf))
  m_ebb = jnp.pad(m_ebb, ((0, 0), (0, pad), (0, pad)))
  weight_eb = jnp.pad(weight_eb, ((0, 0), (0, pad)))
  update = jax.lax.dynamic_update_slice_in_dim

  def strip(s, carry):
    diffs, symbols, error = carry
    start = s * sub
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=sub)
    m_cols = cut(m_ebb, axis=2)
    m_own, w, weight = cut(m_cols, axis=1), cut(w_ebf, axis=1), cut(weight_eb, axis=1)
    carried = cut(carried_ebf, axis=1) + _einsum('ekj,ekf->ejf', m_cols, diffs)

    def column(j, carry):
      own_diffs, own_symbols, error = carry
      moved = _at(carried, j, 1) + _einsum('ek,ekf->ef', _at(m_own, j, 2), own_diffs)
      symbol = flat_grid.symbols(moved)
      q = flat_grid.values(symbol)
      error = error + _at(weight, j, 1)[:, None] * (moved - q) ** 2
      own_diffs = update(own_diffs, (_at(w, j, 1) - q)[:, None], j, axis=1)
      return own_diffs, update(own_symbols, symbol[:, None], j, axis=1), error

    own = (jnp.zeros((e, sub, f), jnp.float32), jnp.zeros((e, sub, f), jnp.uint8))
    own_diffs, own_symbols, error = jax.lax.fori_loop(0, sub, column, (*own, error))
    symbols = update(symbols, own_symbols, start, axis=1)
    return update(diffs, own_diffs, start, axis=1), symbols, error

  init = (jnp.zeros_like(w_ebf), jnp.zeros(w_ebf.shape, jnp.uint8), jnp.zeros((e, f), jnp.float32))
  diffs, symbols, error = jax.lax.fori_loop(0, (size + pad) // sub, strip, init)
  return diffs[:, :size], symbols[:, :size], error


@functools.partial(jax.jit, static_argnames=('size',), donate_argnums=(0, 1, 2))
def _block(state, symbols, error, w, m, diag, grid, start, *, size):
  """Sweeps inputs start..start+size; their slots in `state` then hold w - q."""

  def cut(a, axis):
    return jax.lax.dynamic_slice_in_dim(a, start, size, axis=axis)

  flat_grid = jax.tree.map(lambda a: a[:, 0], grid)
  diffs, block_symbols, block_error = sweep_block(
      cut(state, 1), cut(w, 1), cut(cut(m, 1), 2), cut(diag, 1) ** 2, flat_grid
  )
  place = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
  return place(state, diffs), place(symbols, block_symbols), error + block_error


@functools.partial(jax.jit, static_argnames=('done', 'ahead'), donate_argnums=(0,))
def _carry(state, m, start, *, done, ahead):
  """Carries the differences of inputs start..start+done to the next `ahead` inputs."""
  diffs = jax.lax.dynamic_slice_in_dim(state, start, done, axis=1)
  rows = jax.lax.dynamic_slice_in_dim(m, start, done, axis=1)
  cols = jax.lax.dynamic_slice_in_dim(rows, start + done, ahead, axis=2)
  target = jax.lax.dynamic_slice_in_dim(state, start + done, ahead, axis=1)
  target = target + _einsum('ekj,ekf->ejf', cols, diffs)
  return jax.lax.dynamic_update_slice_in_dim(state, target, start + done, axis=1)


def _halves(state, fixed, start, size, block_size):
  """Sweeps the first half of inputs start..start+size, carries it to the rest, sweeps the rest."""
  if size <= block_size:
    return _block(*state, *fixed, start, size=size)
  blocks = -(-size // block_size)
  left = (1 << (blocks - 1).bit_length() - 1) * block_size
  carried, symbols, error = _halves(state, fixed, start, left, block_size)
  carried = _carry(carried, fixed[1], start, done=left, ahead=size - left)
  return _halves((carried, symbols, error), fixed, start + left, size - left, block_size)


def sweep_factored(
    w_edf: jax.Array, r_edd: jax.Array, grid: grids_core.Grid, *, block_size: int = 128
) -> tuple[jax.Array, jax.Array]:
  """GPTQ with a factor in hand: symbols uint8 [e, d, f] and the damped error [e, f].

  Args:
    w_edf: weights; r_edd: from `factor`; grid: levels [e, 1, f], shared by all inputs.
    block_size: inputs swept between matmuls; it does not change the result.
  """
  w = w_edf.astype(jnp.float32)
  m, diag = feedback(r_edd)
  inputs = w.shape[1]
  state = jnp.array(w, copy=True)
  symbols = jnp.zeros(w.shape, jnp.uint8)
  error = jnp.zeros((w.shape[0], w.shape[2]), jnp.float32)
  _, symbols, error = _halves((state, symbols, error), (w, m, diag, grid), 0, inputs, block_size)
  return symbols, error


@jax.jit
def values_of(grid: grids_core.Grid, symbols: jax.Array) -> jax.Array:
  """What symbols [e, d, f] stand for, float32."""
  return grid.values(symbols)


def order_by_diagonal(h_edd: jax.Array) -> jax.Array:
  """Act-order: inputs of each expert by falling diagonal of H, int [e, d]."""
  return jnp.argsort(-jnp.diagonal(h_edd, axis1=-2, axis2=-1), axis=-1, stable=True)


def permute_inputs(w_edf: jax.Array, order_ed: jax.Array) -> jax.Array:
  """Takes inputs (axis 1) of each expert in the given order."""
  return jnp.take_along_axis(w_edf, order_ed[:, :, None], axis=1)


def permute_hessian(h_edd: jax.Array, order_ed: jax.Array) -> jax.Array:
  """Both axes of H in the given order."""
  rows = jnp.take_along_axis(h_edd, order_ed[:, :, None], axis=1)
  return jnp.take_along_axis(rows, order_ed[:, None, :], axis=2)


def check_shapes(w_edf: jax.Array, h_edd: jax.Array) -> None:
  """Raises UserError unless there is one square Hessian for each matrix."""
  w, h = tuple(w_edf.shape), tuple(h_edd.shape)
  if len(w) != 3 or h != (w[0], w[1], w[1]):
    raise UserError(
        f'weights {list(w)} and Hessians {list(h)} do not fit: [e, d, f] and [e, d, d] are needed'
    )


def gptq(
    w_edf: jax.Array, h_edd: jax.Array, bits: str | int, *, damping: float = 0.1,
    block_size: int = 128, act_order: bool = False, symmetric: bool = False,
    grid_scale: jax.Array | float = 1.0, threshold: jax.Array | float = 0.5,
) -> Quantized:
  """GPTQ of a batch of experts with one grid an output (QMoE section 3.2.2, Alg. in 2210.17323).

  Args:
    w_edf: [e, d, f] weights, d inputs and f outputs.
    h_edd: [e, d, d] Hessians, undamped.
    bits: 'ternary', 2, 3, 4 or 8.
    damping: share of the mean diagonal added to it (QMoE 0.1, GPTQ 0.01), at least 1e-6.
    block_size: inputs swept between matmuls.
    act_order: sweep the inputs by falling diagonal of H; symbols come back in the given order.
    symmetric, grid_scale, threshold: see `grids_core.find_grid`; numbers or one for each expert.

  Weights are taken as finite; NaN among them gives symbols without meaning.

  Raises:
    UserError: shapes that do not fit, or unknown bits.
  """
  check_shapes(w_edf, h_edd)
  lambda_e = damping_lambda(h_edd, damping)
  grid = grids_core.find_grid(
      w_edf, bits, symmetric=symmetric, grid_scale=grid_scale, threshold=threshold
  )
  w = w_edf
  if act_order:
    order = order_by_diagonal(h_edd)
    w, h_edd = permute_inputs(w, order), permute_hessian(h_edd, order)
  r_edd, failed = factor(h_edd, lambda_e)
  symbols, error = sweep_factored(w, r_edd, grid, block_size=block_size)
  if act_order:
    symbols = permute_inputs(symbols, jnp.argsort(order, axis=-1))
  return Quantized(symbols, grid, values_of(grid, symbols), error, failed, lambda_e)


def rtn(
    w_edf: jax.Array, bits: str | int, *, symmetric: bool = False,
    grid_scale: jax.Array | float = 1.0, threshold: jax.Array | float = 0.5,
) -> Quantized:
  """Rounding to the nearest level: GPTQ with H = I. The error is that of the weights."""
  grid = grids_core.find_grid(
      w_edf, bits, symmetric=symmetric, grid_scale=grid_scale, threshold=threshold
  )
  return _round(w_edf, grid)


@jax.jit
def _round(w_edf, grid):
  w = w_edf.astype(jnp.float32)
  symbols = grid.symbols(w)
  values = grid.values(symbols)
  experts = w.shape[0]
  return Quantized(
      symbols, grid, values, jnp.sum((w - values) ** 2, axis=1),
      jnp.zeros((experts,), bool), jnp.zeros((experts,), jnp.float32),
  )
