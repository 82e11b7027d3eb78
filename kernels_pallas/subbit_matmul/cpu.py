"""The product in C++ for CPUs: weights are found column by column and rows of x added up.

Work follows the weights that are not zero, for any number of rows; nothing is expanded.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import extension
from kernels_pallas.subbit_matmul import layout
from kernels_pallas.ternary_matmul import layout as two_bit


@functools.cache
def places(d: int) -> np.ndarray:
  """Input of each place in the words of a column, int32 [16 words]; d where there is none."""
  ordered = layout.in_code(np.arange(1, d + 1, dtype=np.int32), 0) - 1
  chunks = ordered.reshape(-1, two_bit.STEPS, two_bit.WORDS, 2).transpose(0, 2, 3, 1)
  # Of a word the first step is highest, and its second half above the first.
  return np.where(chunks < 0, d, chunks)[..., ::-1].reshape(-1)


def subbit_matmul(
    x_md: jax.Array, rows_rl: jax.Array, starts_es: jax.Array, records_es1w: jax.Array,
    levels_enc: jax.Array, homes_etl: jax.Array, group_sizes_e: jax.Array, *, sizes: layout.Sizes,
) -> jax.Array:
  """See `api.subbit_matmul`."""
  m = x_md.shape[0]
  tail = sizes.tail
  x_pm = x_md.astype(jnp.float32).T.at[places(sizes.d)].get(mode='fill', fill_value=0)
  out = jax.ShapeDtypeStruct((m, sizes.f), jnp.float32)
  call = extension.call(extension.SUBBIT_MATMUL, out)
  y_mf = call(
      x_pm, rows_rl, starts_es, records_es1w, extension.values(levels_enc), homes_etl,
      group_sizes_e,
      size=np.int64(sizes.size), steps=np.int64(layout.steps_of(sizes.d, sizes.size)),
      header=np.int64(sizes.header), tail_group=np.int64(tail.group),
      tail_steps=np.int64(tail.steps), tail_lanes=np.int64(tail.lanes),
      tail_bits=np.int64(tail.bits), tail_end=np.int64(tail.end),
  )
  return y_mf.astype(x_md.dtype)
