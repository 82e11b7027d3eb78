"""The product in C++ for CPUs: weights are found block by block and rows of x added up.

Work follows the codewords and the weights that are not zero, for any number of rows.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import extension


def codeword_matmul(
    x_md: jax.Array, words_sw: jax.Array, offsets_eb: jax.Array, table_e: jax.Array,
    levels_er2: jax.Array, entries_tuk: jax.Array, group_sizes_e: jax.Array, *, block_rows: int,
) -> jax.Array:
  """See `api.codeword_matmul`."""
  out = jax.ShapeDtypeStruct((x_md.shape[0], levels_er2.shape[1]), jnp.float32)
  call = extension.call(extension.CODEWORD_MATMUL, out)
  y_mf = call(
      x_md.astype(jnp.float32).T, words_sw, offsets_eb, table_e, extension.values(levels_er2),
      entries_tuk, group_sizes_e, block_rows=np.int64(block_rows),
  )
  return y_mf.astype(x_md.dtype)
