"""Chosen experts in plain XLA: a path for few tokens, one for many, and the dense one.

Few tokens read the weights of their own experts, one after the other. Many are gathered for each
expert in static blocks of rows, so work and time follow what was chosen, however uneven. Where
most is chosen for many tokens the products of all experts are quicker; measured on two cores.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul import ref as grouped

Experts = Mapping[str, Any]
# Hidden units from the products wi x and, where gated, gate x.
Act = Callable[..., jax.Array]
# Up to so many tokens go one by one. Above, rows are gathered in blocks of these sizes.
FEW = 4
BLOCKS = (256, 64, 16)
SMALL_BLOCKS = (32, 8)
# With more tokens than MANY, from this share of all pairs on everything is computed.
MANY, DENSE_SHARE = 64, 0.6


def _expert(experts: Experts, e: jax.Array) -> dict[str, jax.Array]:
  pick = lambda w: jax.lax.dynamic_index_in_dim(w, e, 0, keepdims=False)
  return {name: pick(w) for name, w in experts.items()}


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
  return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)


def _block(own: Mapping[str, jax.Array], x_md: jax.Array, act: Act) -> jax.Array:
  """One expert on rows, float32 [m, d]."""

  def product(x, name):
    y = _dot(x, own[name])
    return y + own[f'{name}_bias'].astype(y.dtype)[None] if f'{name}_bias' in own else y

  hidden = act(*(product(x_md, name) for name in ('wi', 'gate') if name in own))
  return product(hidden.astype(x_md.dtype), 'wo')


def one_by_one(x_md: jax.Array, experts: Experts, chosen_me: jax.Array, act: Act) -> jax.Array:
  """Each token's experts in turn, float32 [m, d]; reads only what was chosen."""

  def token(y_md, t):
    x = jax.lax.dynamic_slice_in_dim(x_md, t, 1)
    order_e = jnp.argsort(~chosen_me[t], stable=True)
    add = lambda i, y: y + _block(_expert(experts, order_e[i]), x, act)
    y = jax.lax.fori_loop(0, chosen_me[t].sum(), add, jnp.zeros(x.shape, jnp.float32))
    return jax.lax.dynamic_update_slice_in_dim(y_md, y, t, 0), None

  zeros = jnp.zeros(x_md.shape, jnp.float32)
  return jax.lax.scan(token, zeros, jnp.arange(len(x_md)))[0]


def by_expert(x_md: jax.Array, experts: Experts, chosen_me: jax.Array, act: Act) -> jax.Array:
  """Each expert's tokens gathered in blocks of rows, float32 [m, d]."""
  m = len(x_md)
  tokens_em = jnp.argsort(~chosen_me.T, axis=1, stable=True).astype(jnp.int32)
  sizes = tuple(size for size in (BLOCKS if m > MANY else SMALL_BLOCKS) if size <= m) or (m,)

  def expert(e, _, rows, y_md):
    own = _expert(experts, e)

    def block(first, left, size, y_md):
      at, mine = grouped.block_of(first, left, size, m)
      token = jax.lax.dynamic_slice(tokens_em, (e, at), (1, size))[0]
      y = _block(own, x_md.at[token].get(mode='promise_in_bounds'), act)
      return y_md.at[token].add(
          jnp.where(mine, y, 0.0), mode='promise_in_bounds', unique_indices=True
      )

    return grouped.loop_over_blocks(jnp.int32(0), rows, sizes, block, y_md)

  counts_e = chosen_me.sum(0, dtype=jnp.int32)
  return grouped.loop_over_experts(counts_e, expert, jnp.zeros(x_md.shape, jnp.float32))


def hidden_units(x_md: jax.Array, experts: Experts, act: Act) -> jax.Array:
  """What wo multiplies, of all experts for all tokens, float32 [m, e, f]."""

  def product(name):
    y_mef = jnp.einsum(
        'md,edf->mef', x_md, experts[name].astype(x_md.dtype), preferred_element_type=jnp.float32
    )
    bias = experts.get(f'{name}_bias')
    return y_mef if bias is None else y_mef + bias.astype(y_mef.dtype)[None]

  return act(*(product(name) for name in ('wi', 'gate') if name in experts))


def everything(x_md: jax.Array, experts: Experts, chosen_me: jax.Array, act: Act) -> jax.Array:
  """All experts for all tokens, those not chosen set to 0, float32 [m, d]."""
  hidden = hidden_units(x_md, experts, act)
  hidden = jnp.where(chosen_me[..., None], hidden, 0.0).astype(x_md.dtype)
  y_md = jnp.einsum(
      'mef,efd->md', hidden, experts['wo'].astype(x_md.dtype), preferred_element_type=jnp.float32
  )
  if 'wo_bias' in experts:
    y_md = y_md + jnp.matmul(
        chosen_me.astype(jnp.float32), experts['wo_bias'].astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
  return y_md


def neuron_select(
    x_md: jax.Array, experts: Experts, chosen_me: jax.Array, act: Act
) -> jax.Array:
  """See `api.neuron_select`; the path depends on the number of tokens and on what was chosen."""
  if len(x_md) <= MANY:
    sparse = one_by_one if len(x_md) <= FEW else by_expert
    return sparse(x_md, experts, chosen_me, act).astype(x_md.dtype)
  y_md = jax.lax.cond(
      jnp.mean(chosen_me, dtype=jnp.float32) >= DENSE_SHARE,
      lambda x, own, chosen: everything(x, own, chosen, act),
      lambda x, own, chosen: by_expert(x, own, chosen, act),
      x_md, dict(experts), chosen_me,
  )
  return y_md.astype(x_md.dtype)
