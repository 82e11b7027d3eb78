"""The product on GPUs, by XLA: ragged products, and a scatter of the kept outputs row by row."""

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul import gpu as grouped


def lowrank_sparse_matmul(
    x_md: jax.Array, left_edr: jax.Array, right_erf: jax.Array, kept_eds: jax.Array,
    index_es: jax.Array, group_sizes_e: jax.Array,
) -> jax.Array:
  """See `api.lowrank_sparse_matmul`."""
  low_mr, kept_ms = (grouped.product(x_md, w, group_sizes_e) for w in (left_edr, kept_eds))
  return expand(low_mr, kept_ms, right_erf, index_es, group_sizes_e)


def expand(
    low_mr: jax.Array, kept_ms: jax.Array, right_erf: jax.Array, index_es: jax.Array,
    group_sizes_e: jax.Array,
) -> jax.Array:
  """See `api.expand`."""
  y_mf = grouped.product(low_mr, right_erf, group_sizes_e)
  row_m = jnp.arange(len(y_mf))
  ends_e = jnp.cumsum(group_sizes_e)
  expert_m = jnp.searchsorted(ends_e, row_m, side='right')
  kept_ms = jnp.where((row_m < ends_e[-1])[:, None], kept_ms.astype(y_mf.dtype), 0)
  index_ms = index_es.at[expert_m].get(mode='clip')
  return y_mf.at[row_m[:, None], index_ms].add(kept_ms, mode='drop')
