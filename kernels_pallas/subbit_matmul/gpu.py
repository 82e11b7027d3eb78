"""The product on GPUs, by XLA: one expert at a time is expanded, used for its rows and dropped."""

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul import ref as grouped
from kernels_pallas.subbit_matmul import layout
from kernels_pallas.subbit_matmul.layout import decode
from kernels_pallas.ternary_matmul import layout as two_bit


def dense(
    rows_rl: jax.Array, starts_es: jax.Array, records_es1w: jax.Array, levels_enc: jax.Array,
    homes_etl: jax.Array, expert: jax.Array | int, dtype, sizes: layout.Sizes,
) -> jax.Array:
  """One expert's matrix [d, f]."""
  pick = lambda a: jax.lax.dynamic_index_in_dim(jnp.asarray(a), expert, 0, keepdims=False)
  words = decode.kept_words(rows_rl, starts_es, records_es1w, expert, sizes)
  kept = two_bit.dense(words, pick(levels_enc), 16 * len(words), dtype)
  return layout.from_code(kept, 0, sizes.d)[:, layout.place_of(pick(homes_etl), jnp)[: sizes.f]]


def subbit_matmul(
    x_md: jax.Array, rows_rl: jax.Array, starts_es: jax.Array, records_es1w: jax.Array,
    levels_enc: jax.Array, homes_etl: jax.Array, group_sizes_e: jax.Array, *, sizes: layout.Sizes,
) -> jax.Array:
  """See `api.subbit_matmul`."""
  arrays = rows_rl, starts_es, records_es1w, levels_enc, homes_etl
  return grouped.grouped_matmul(
      x_md, lambda e, _: dense(*arrays, e, x_md.dtype, sizes), group_sizes_e, sizes.f
  )
