"""The product in XLA for CPUs: an expert's words are decoded, then multiplied as two-bit words."""

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul import ref as grouped
from kernels_pallas.subbit_matmul import layout
from kernels_pallas.subbit_matmul.layout import decode
from kernels_pallas.ternary_matmul import ref as two_bit


def subbit_matmul(
    x_md: jax.Array, rows_rl: jax.Array, starts_es: jax.Array, records_es1w: jax.Array,
    levels_enc: jax.Array, homes_etl: jax.Array, group_sizes_e: jax.Array, *, sizes: layout.Sizes,
) -> jax.Array:
  """See `api.subbit_matmul`."""
  pick = lambda a, e: jax.lax.dynamic_index_in_dim(a, e, 0, keepdims=False)

  x_md = layout.in_code(x_md, 1, jnp)

  def product(e, x_block):
    words = decode.kept_words(rows_rl, starts_es, records_es1w, e, sizes)
    y_mc = two_bit.product(x_block, words, pick(levels_enc, e))
    return y_mc[:, layout.place_of(pick(homes_etl, e), jnp)[: sizes.f]]

  return grouped.in_blocks(x_md, product, group_sizes_e, sizes.f)
