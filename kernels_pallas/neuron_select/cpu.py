"""Chosen experts by the grouped products in C++ for CPUs: pairs of token and expert are rows.

Pairs are sorted by expert. There is room for all pairs, work for the chosen ones: whatever share of
the experts a token takes, a matrix is read where it lies, once for the tokens that chose it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import extension
from kernels_pallas.grouped_matmul import cpu as grouped

# Narrower experts are read faster by pairs in one loop.
LEAST_WIDTH = 128
# Floats of the rows of all pairs: with more, moving them costs more than the products save.
MOST_FLOATS = 1 << 24


def supports(m: int, d: int, f: int, e: int, dtype: Any, *weight_dtypes: Any) -> str:
  """'' where `neuron_select` takes these and is worth it, or why not."""
  if f < LEAST_WIDTH:
    return f'{f} neurons an expert are few'
  if m * e * d > MOST_FLOATS:
    return f'{m} tokens and {e} experts make {m * e} rows of {d}'
  if jax.device_count() > 1:
    return 'XLA cannot divide a foreign call over devices'
  return extension.without(dtype, *weight_dtypes)


def neuron_select(
    x_md: jax.Array, experts: Mapping[str, jax.Array], chosen_me: jax.Array,
    act: Callable[..., jax.Array],
) -> jax.Array:
  """See `api.neuron_select`."""
  m, e = chosen_me.shape
  chosen_n = chosen_me.T.reshape(-1)
  rank_n = jnp.cumsum(chosen_n, dtype=jnp.int32) - 1
  # The numbers of the chosen pairs, one expert's after the other's.
  row_n = jnp.where(chosen_n, rank_n, m * e)
  pair_n = jnp.zeros(m * e, jnp.int32).at[row_n].set(
      jnp.arange(m * e, dtype=jnp.int32), mode='drop', unique_indices=True
  )
  sizes_e = chosen_me.sum(0, dtype=jnp.int32)

  def product(x, name):
    y = grouped.product(x, experts[name], sizes_e, dtype=jnp.float32)
    if f'{name}_bias' not in experts:
      return y
    return y + experts[f'{name}_bias'].astype(y.dtype)[pair_n // m]

  x_nd = x_md.at[pair_n % m].get(mode='promise_in_bounds')
  hidden_nf = act(*(product(x_nd, name) for name in ('wi', 'gate') if name in experts))
  y_nd = product(hidden_nf.astype(x_md.dtype), 'wo')
  y_nd = y_nd.at[jnp.maximum(rank_n, 0)].get(mode='promise_in_bounds')
  y_nd = jnp.where(chosen_n[:, None], y_nd, 0.0)
  return y_nd.reshape(e, m, -1).sum(0).astype(x_md.dtype)
