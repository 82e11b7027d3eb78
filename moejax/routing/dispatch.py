"""Tokens to experts and back: sort by expert, no padding to capacity, gradients by gathers."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import numpy as np


def sort_by_expert(
    choice_mk: jax.Array, keep_mk: jax.Array, num_experts: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Orders the m*k (token, choice) pairs by expert, dropped pairs last.

  Returns (order, inverse, group_sizes_e), all int32: order[i] is the pair at sorted place i,
  inverse its inverse permutation, group_sizes_e the kept pairs of each expert.
  """
  flat = jnp.where(keep_mk, choice_mk, num_experts).reshape(-1)
  order = jnp.argsort(flat, stable=True).astype(jnp.int32)
  inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))
  group_sizes_e = jnp.zeros(num_experts, jnp.int32).at[flat].add(1, mode='drop')
  return order, inverse, group_sizes_e


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
  return x.at[index].get(mode='promise_in_bounds')


def sum_choices(x_mkd: jax.Array) -> jax.Array:
  """Sum over the choices of a token, [m, d], in float32 at least and rounded once.

  Of few choices by additions, which cost a CPU less than a sum.
  """
  count = x_mkd.shape[1]
  if count > 8:
    return x_mkd.sum(1)
  wide = jnp.promote_types(x_mkd.dtype, jnp.float32)
  parts = [part.astype(wide) for part in jax.lax.split(x_mkd, [1] * count, axis=1)]
  return functools.reduce(jnp.add, parts)[:, 0].astype(x_mkd.dtype)


@jax.custom_vjp
def permute(x_md: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
  """Rows of x in sorted order: pair p belongs to token p // k with k = len(order) / m.

  The gradient gathers by the inverse permutation and sums the k copies, so it never scatters.
  """
  return _take(x_md, order // (order.shape[0] // x_md.shape[0]))


def _permute_fwd(x_md, order, inverse):
  return permute(x_md, order, inverse), (inverse, x_md.shape[0])


def _permute_bwd(residuals, dy):
  inverse, m = residuals
  zero = np.zeros(inverse.shape, jax.dtypes.float0)
  return sum_choices(_take(dy, inverse).reshape(m, -1, dy.shape[-1])), zero, zero


permute.defvjp(_permute_fwd, _permute_bwd)


@jax.custom_vjp
def unpermute(y: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
  """Sorted rows back in pair order; the gradient is a gather too."""
  return _take(y, inverse)


def _unpermute_fwd(y, order, inverse):
  return _take(y, inverse), order


def _unpermute_bwd(order, dy):
  zero = np.zeros(order.shape, jax.dtypes.float0)
  return _take(dy, order), zero, zero


unpermute.defvjp(_unpermute_fwd, _unpermute_bwd)


def apply_experts(
    x_md: jax.Array,
    choice_mk: jax.Array,
    keep_mk: jax.Array,
    num_experts: int,
    expert_fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
  """Runs expert_fn(x_sorted, group_sizes_e, pair) on tokens sorted by expert.

  Sorted row i is the (token, choice) pair number pair[i] = token * k + choice.

  Returns each pair's output [m, k, d]; dropped pairs give 0 provided expert_fn gives 0 for rows
  past the last group.
  """
  order, inverse, group_sizes_e = sort_by_expert(choice_mk, keep_mk, num_experts)
  y = expert_fn(permute(x_md, order, inverse), group_sizes_e, order)
  return unpermute(y, order, inverse).reshape(*choice_mk.shape, y.shape[-1])
