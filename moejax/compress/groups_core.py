"""GPTQ with a grid for each group of inputs (QMoE's --groupsize): arrays in, arrays out.

Semantics, those of the published code: the grid of a group comes from weights that have seen the
updates of finished blocks only, taken when the sweep reaches the group's first input. So with
group_size < block_size the block size changes the result (by a quarter of the symbols at group size
16, block size 8 or 128).
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from moejax.compress import gptq_core, grids_core
from moejax.errors import UserError


@functools.partial(jax.jit, static_argnames=('size',))
def _updated(w, r, diffs, start, *, size):
  """Weights of inputs start..start+size as GPTQ has moved them once all before are quantized.

  That is w + R_aa^-T R_ba^T (w - q)_b with b the inputs before and a those ahead; the inverse of a
  triangle needs no more of a than its first inputs.
  """
  cols = jax.lax.dynamic_slice_in_dim(r, start, size, axis=2)
  before = jnp.arange(w.shape[1]) < start
  carried = jnp.einsum(
      'ekj,ekf->ejf', jnp.where(before[None, :, None], cols, 0.0), diffs, precision='highest'
  )
  own = jax.lax.dynamic_slice_in_dim(cols, start, size, axis=1)
  moved = jax.lax.linalg.triangular_solve(own, carried, left_side=True, transpose_a=True)
  return jax.lax.dynamic_slice_in_dim(w, start, size, axis=1) + moved


@functools.partial(jax.jit, static_argnames=('size',))
def _segment(w, m, weight, diffs, grid, start, *, size):
  """Sweeps inputs start..start+size under one grid."""
  cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
  cols, own_w = cut(m, axis=2), cut(w, axis=1)
  carried = own_w + jnp.einsum('ekj,ekf->ejf', cols, diffs, precision='highest')
  flat_grid = jax.tree.map(lambda a: a[:, 0], grid)
  own_diffs, symbols, error = gptq_core.sweep_block(
      carried, own_w, cut(cols, axis=1), cut(weight, axis=1), flat_grid
  )
  diffs = jax.lax.dynamic_update_slice_in_dim(diffs, own_diffs, start, axis=1)
  return diffs, symbols, grid.values(symbols), error


def gptq_grouped(
    w_edf: jax.Array, h_edd: jax.Array, bits: str | int, group_size: int, *,
    damping: float = 0.1, block_size: int = 128, act_order: bool = False,
    symmetric: bool = False, grid_scale: jax.Array | float = 1.0,
    threshold: jax.Array | float = 0.5,
) -> gptq_core.Quantized:
  """As `gptq_core.gptq` with levels [e, groups, f]; group j covers inputs j * group_size and on.

  With act_order the groups are of the inputs as swept, so only `values` is meaningful to a reader
  of the given order.

  Raises:
    UserError: group_size is below 1.
  """
  if group_size < 1:
    raise UserError(f'group_size = {group_size}: at least 1, or None for one grid an output')
  lambda_e = gptq_core.damping_lambda(h_edd, damping)
  w = w_edf.astype(jnp.float32)
  if act_order:
    order = gptq_core.order_by_diagonal(h_edd)
    w = gptq_core.permute_inputs(w, order)
    h_edd = gptq_core.permute_hessian(h_edd, order)
  r, failed = gptq_core.factor(h_edd, lambda_e)
  m, diag = gptq_core.feedback(r)
  d = w.shape[1]
  find = functools.partial(
      grids_core.find_grid, bits=bits, symmetric=symmetric, grid_scale=grid_scale,
      threshold=threshold,
  )
  diffs, grids, pieces, values = jnp.zeros_like(w), [], [], []
  error = jnp.zeros((w.shape[0], w.shape[2]), jnp.float32)
  for block in range(0, d, block_size):
    block_end = min(block + block_size, d)
    firsts = [g for g in range(block, block_end) if g % group_size == 0]
    reach = min(firsts[-1] + group_size, d) if firsts else block_end
    updated = _updated(w, r, diffs, block, size=reach - block)
    bounds = sorted({block, *firsts, block_end})
    for start, end in itertools.pairwise(bounds):
      if start % group_size == 0:
        grids.append(find(updated[:, start - block : start - block + group_size]))
      diffs, symbols, segment_values, segment_error = _segment(
          w, m, diag**2, diffs, grids[-1], start, size=end - start
      )
      pieces.append(symbols)
      values.append(segment_values)
      error = error + segment_error
  symbols, dequantized = jnp.concatenate(pieces, 1), jnp.concatenate(values, 1)
  if act_order:
    back = jnp.argsort(order, axis=-1)
    symbols = gptq_core.permute_inputs(symbols, back)
    dequantized = gptq_core.permute_inputs(dequantized, back)
  grid = jax.tree.map(lambda *a: a[0] if a[0].shape[-1] == 1 else jnp.concatenate(a, 1), *grids)
  return gptq_core.Quantized(symbols, grid, dequantized, error, failed, lambda_e)


def rtn_grouped(
    w_edf: jax.Array, bits: str | int, group_size: int, **grid_options
) -> gptq_core.Quantized:
  """Rounding with a grid for each group of inputs: `gptq_grouped` under H = I."""
  e, d, _ = w_edf.shape
  eye = jnp.broadcast_to(jnp.eye(d, dtype=jnp.float32), (e, d, d))
  out = gptq_grouped(w_edf, eye, bits, group_size, damping=0.0, **grid_options)
  return out._replace(damping=jnp.zeros((e,), jnp.float32))
