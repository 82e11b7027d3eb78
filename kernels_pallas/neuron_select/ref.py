"""Chosen experts in plain XLA: paths for what is chosen and paths for all, and the rule between.

Up to FEW tokens go by pairs of token and expert, whose weights are read where they lie. More are
gathered for each expert in static blocks of rows, so that work and time follow what was chosen,
however uneven. Where much is chosen the products of all experts are quicker, and are what the dense
layer would do; `all_from` says from which share on. Measured on two cores.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul import ref as grouped

Experts = Mapping[str, Any]
# Hidden units from the products wi x and, where gated, gate x.
Act = Callable[..., jax.Array]
# Up to so many tokens go by pairs. Above, rows are gathered in blocks of these sizes.
FEW = 32
BLOCKS = grouped.BLOCKS
SMALL_TOKENS, SMALL_BLOCKS = 64, (32, 16, 8)
# Gathering a token's row for an expert costs as much as so many of the expert's neurons.
SMALL_ROW_NEURONS, ROW_NEURONS = 100, 160
# Neurons whose weights are brought together for one product, where all are computed.
GROUP_NEURONS = 512
# So many rows, tokens times experts, are laid out for one product of all.
LAID_OUT = 4096
# Terms of a sum that one loop adds up, and elements of its partial sums.
TERMS, MAX_TERMS, PARTIAL = 8, 32, 1 << 16


def all_from(tokens: int, width: int) -> float:
  """The share of all pairs from which on computing all experts of `width` neurons is quicker."""
  if tokens <= FEW:
    return min(1.0, 1.2 / math.sqrt(tokens))
  return width / (width + (SMALL_ROW_NEURONS if tokens <= SMALL_TOKENS else ROW_NEURONS))


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


def _terms(rows: int, columns: int) -> int:
  """In how many terms to add up `rows` rows: a divisor, so that partial sums stay in the cache."""
  divisors = [n for n in range(1, min(rows, MAX_TERMS) + 1) if rows % n == 0]
  fitting = [n for n in divisors if n >= TERMS and rows // n * columns <= PARTIAL]
  return fitting[0] if fitting else divisors[-1]


def _in_terms(w_eab: jax.Array) -> jax.Array:
  """[e, rows, columns] as [e, terms, rows / terms, columns]."""
  e, rows, columns = w_eab.shape
  terms = _terms(rows, columns)
  return w_eab.reshape(e, terms, rows // terms, columns)


def _vector_dot(x_a: jax.Array, w_etrb: jax.Array, e: jax.Array) -> jax.Array:
  """x times one expert's matrix, float32 [1, columns].

  XLA adds slices up in one loop that reads the weights where they lie; for a product it would copy
  them first.
  """
  _, terms, rows, columns = w_etrb.shape
  x_tr = x_a.reshape(terms, rows).astype(jnp.float32)
  partial_rb = jnp.zeros((), jnp.float32)
  for t in range(terms):
    w_rb = jax.lax.dynamic_slice(w_etrb, (e, t, 0, 0), (1, 1, rows, columns))[0, 0]
    partial_rb = partial_rb + x_tr[t][:, None] * w_rb.astype(jnp.float32)
  return _sum_rows(partial_rb)


def _sum_rows(x_rb: jax.Array) -> jax.Array:
  """The sum, [1, columns], kept out of the loop that made x, which would go element by element.

  Before 0.12 XLA drops the barrier too soon, and only a product is kept apart.
  """
  if jax.__version_info__ < (0, 12):
    return jnp.matmul(jnp.ones((1, len(x_rb))), x_rb, precision=jax.lax.Precision.HIGHEST)
  return jax.lax.optimization_barrier(x_rb).sum(0, keepdims=True)


def by_pair(x_md: jax.Array, experts: Experts, chosen_me: jax.Array, act: Act) -> jax.Array:
  """Every pair of token and expert in turn, float32 [m, d]; reads only what was chosen.

  In order of the experts, so that a second token finds an expert's weights in the cache.
  """
  m, (e, _, f) = len(x_md), experts['wi'].shape
  up = {name: _in_terms(experts[name]) for name in ('wi', 'gate') if name in experts}
  wo = _in_terms(experts['wo'])
  pair_n = jnp.argsort(~chosen_me.T.reshape(-1), stable=True).astype(jnp.int32)
  pairs = chosen_me.sum(dtype=jnp.int32)

  def plus_bias(y, name, e):
    if f'{name}_bias' not in experts:
      return y
    return y + jax.lax.dynamic_slice(experts[f'{name}_bias'], (e, 0), y.shape).astype(y.dtype)

  def hidden(i, hidden_nf):
    own, token = pair_n[i] // m, pair_n[i] % m
    x = jax.lax.dynamic_index_in_dim(x_md, token, keepdims=False)
    units = act(*(plus_bias(_vector_dot(x, w, own), name, own) for name, w in up.items()))
    return jax.lax.dynamic_update_slice(hidden_nf, units.astype(jnp.float32), (i, 0))

  hidden_nf = jax.lax.fori_loop(0, pairs, hidden, jnp.zeros((m * e, f), jnp.float32))
  hidden_nf = hidden_nf.astype(x_md.dtype)

  def output(i, y_md):
    own, token = pair_n[i] // m, pair_n[i] % m
    units = jax.lax.dynamic_index_in_dim(hidden_nf, i, keepdims=False)
    y = plus_bias(_vector_dot(units, wo, own), 'wo', own)
    y = y + jax.lax.dynamic_index_in_dim(y_md, token)
    return jax.lax.dynamic_update_slice(y_md, y, (token, 0))

  return jax.lax.fori_loop(0, pairs, output, jnp.zeros(x_md.shape, jnp.float32))


def by_expert(x_md: jax.Array, experts: Experts, chosen_me: jax.Array, act: Act) -> jax.Array:
  """Each expert's tokens gathered in blocks of rows, float32 [m, d]."""
  m = len(x_md)
  tokens_em = jnp.argsort(~chosen_me.T, axis=1, stable=True).astype(jnp.int32)
  blocks = BLOCKS if m > SMALL_TOKENS else SMALL_BLOCKS
  sizes = tuple(size for size in blocks if size <= m) or (m,)

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


def all_by_expert(x_md: jax.Array, experts: Experts, chosen_me: jax.Array, act: Act) -> jax.Array:
  """All experts for all tokens, those not chosen set to 0, float32 [m, d]; for few tokens.

  The tokens are laid out once for each expert: one product a matrix, which then needs no copy.
  """
  m, (e, d, f) = len(x_md), experts['wi'].shape
  x_emd = jax.lax.optimization_barrier(jnp.broadcast_to(x_md[None], (e, m, d)))

  def product(name):
    y_emf = jnp.matmul(
        x_emd, experts[name].astype(x_md.dtype), preferred_element_type=jnp.float32
    )
    bias = experts.get(f'{name}_bias')
    return y_emf if bias is None else y_emf + bias.astype(y_emf.dtype)[:, None]

  hidden_emf = act(*(product(name) for name in ('wi', 'gate') if name in experts))
  hidden_emf = jnp.where(chosen_me.T[..., None], hidden_emf, 0.0).astype(x_md.dtype)
  y_md = _dot(hidden_emf.swapaxes(0, 1).reshape(m, e * f), experts['wo'].reshape(e * f, d))
  return plus_output_bias(y_md, experts, chosen_me)


def all_in_groups(x_md: jax.Array, experts: Experts, chosen_me: jax.Array, act: Act) -> jax.Array:
  """All experts for all tokens, those not chosen set to 0, float32 [m, d]; for many tokens.

  Neighbours' weights are brought together, so that narrow experts make wide products.
  """
  m, (e, d, f) = len(x_md), experts['wi'].shape
  group = max(n for n in range(1, e + 1) if e % n == 0 and (n == 1 or n * f <= GROUP_NEURONS))
  grouped_experts = {
      name: w.reshape(e // group, group, *w.shape[1:])
      for name, w in experts.items() if name != 'wo_bias'
  }
  chosen_gmn = chosen_me.reshape(m, e // group, group).swapaxes(0, 1)

  def together(name, w):
    if name in ('wi', 'gate'):
      return w.swapaxes(0, 1).reshape(d, group * f)
    return w.reshape(group * f, *w.shape[2:])

  def step(y_md, given):
    own, chosen_mn = given
    chosen_mh = jnp.repeat(chosen_mn, f, axis=1)
    masked = lambda *products: jnp.where(chosen_mh, act(*products), 0.0)
    one = {name: together(name, w) for name, w in own.items()}
    return y_md + _block(one, x_md, masked), None

  zeros = jnp.zeros(x_md.shape, jnp.float32)
  y_md = jax.lax.scan(step, zeros, (grouped_experts, chosen_gmn))[0]
  return plus_output_bias(y_md, experts, chosen_me)


def plus_output_bias(y_md: jax.Array, experts: Experts, chosen_me: jax.Array) -> jax.Array:
  """y and the output biases of the chosen experts, float32 [m, d]."""
  if 'wo_bias' not in experts:
    return y_md
  return y_md + jnp.matmul(
      chosen_me.astype(jnp.float32), experts['wo_bias'].astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST,
  )


def everything(x_md: jax.Array, experts: Experts, chosen_me: jax.Array, act: Act) -> jax.Array:
  """What all paths compute, in plain products that differentiate well, float32 [m, d]."""
  hidden = hidden_units(x_md, experts, act)
  hidden = jnp.where(chosen_me[..., None], hidden, 0.0).astype(x_md.dtype)
  y_md = jnp.einsum(
      'mef,efd->md', hidden, experts['wo'].astype(x_md.dtype), preferred_element_type=jnp.float32
  )
  return plus_output_bias(y_md, experts, chosen_me)


def neuron_select(
    x_md: jax.Array, experts: Experts, chosen_me: jax.Array, act: Act
) -> jax.Array:
  """See `api.neuron_select`; the path goes by the number of tokens and by what was chosen."""
  m, e = chosen_me.shape
  chosen = by_pair if m <= FEW else by_expert
  every = all_by_expert if m <= FEW and m * e <= LAID_OUT else all_in_groups
  limit = all_from(m, experts['wo'].shape[1])
  if limit == 1.0:
    return chosen(x_md, experts, chosen_me, act).astype(x_md.dtype)
  y_md = jax.lax.cond(
      jnp.mean(chosen_me, dtype=jnp.float32) > limit,
      lambda x, own, chosen_me: every(x, own, chosen_me, act),
      lambda x, own, chosen_me: chosen(x, own, chosen_me, act),
      x_md, dict(experts), chosen_me,
  )
  return y_md.astype(x_md.dtype)
