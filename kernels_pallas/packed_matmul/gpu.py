"""The product on GPUs, by XLA: one expert at a time is expanded, used for its rows and dropped."""

import jax

from kernels_pallas.grouped_matmul import ref as grouped
from kernels_pallas.packed_matmul import layout


def packed_matmul(
    x_md: jax.Array, words_ewf: jax.Array, scale_efg: jax.Array, zero_efg: jax.Array,
    group_sizes_e: jax.Array, *, bits: int, group_size: int = 0,
) -> jax.Array:
  """See `api.packed_matmul`."""
  d = x_md.shape[1]
  pick = lambda a, e: jax.lax.dynamic_index_in_dim(a, e, 0, keepdims=False)

  def expert(e, _):
    words, scale, zero = (pick(a, e) for a in (words_ewf, scale_efg, zero_efg))
    return layout.inputs_at(words, scale, zero, d, bits, group_size, 0, d, x_md.dtype)

  return grouped.grouped_matmul(x_md, expert, group_sizes_e, words_ewf.shape[2])
