"""The product in C++ for CPUs: bits become weights in the cache, where they are multiplied."""

import jax

from kernels_pallas import extension


def ternary_matmul(
    x_md: jax.Array, words_ewf: jax.Array, levels_enf: jax.Array, group_sizes_e: jax.Array
) -> jax.Array:
  """See `api.ternary_matmul`; x is float32 or bfloat16."""
  out = jax.ShapeDtypeStruct((x_md.shape[0], words_ewf.shape[2]), x_md.dtype)
  call = extension.call(extension.TERNARY_MATMUL, out)
  return call(x_md, words_ewf, extension.values(levels_enf), group_sizes_e)
