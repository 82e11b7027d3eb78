"""The product in C++ for CPUs: symbols become weights in the cache, where they are multiplied."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import extension


def packed_matmul(
    x_md: jax.Array, words_ewf: jax.Array, scale_efg: jax.Array, zero_efg: jax.Array,
    group_sizes_e: jax.Array, *, bits: int, group_size: int = 0,
) -> jax.Array:
  """See `api.packed_matmul`; x is float32 or bfloat16."""
  out = jax.ShapeDtypeStruct((x_md.shape[0], words_ewf.shape[2]), x_md.dtype)
  call = extension.call(extension.PACKED_MATMUL, out)
  levels = jnp.promote_types(scale_efg.dtype, zero_efg.dtype)
  scale_efg, zero_efg = (extension.values(a.astype(levels)) for a in (scale_efg, zero_efg))
  return call(
      x_md, words_ewf, scale_efg, zero_efg, group_sizes_e, bits=np.int64(bits),
      group_size=np.int64(group_size),
  )
