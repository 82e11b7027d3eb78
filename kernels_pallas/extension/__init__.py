"""Products from codes in C++, for CPUs, where they were built; XLA serves where they were not.

`setup.py` compiles the `.cc` files of this package and of the operations into one library,
`kernels_pallas._cpu`, which XLA calls by its foreign function interface.
"""

import ctypes
import functools
import importlib.util

import jax
import jax.numpy as jnp

SUBBIT_MATMUL = 'moejax_subbit_matmul'
CODEWORD_MATMUL = 'moejax_codeword_matmul'


@functools.cache
def missing() -> str:
  """'' where the library is in use, or why it is not; registers its functions once."""
  spec = importlib.util.find_spec('kernels_pallas._cpu')
  if spec is None or spec.origin is None:
    return 'kernels_pallas is without its CPU extension; setup.py builds it with a C++ compiler'
  try:
    library = ctypes.CDLL(spec.origin)
    for name in (SUBBIT_MATMUL, CODEWORD_MATMUL):
      jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform='cpu')
  except (OSError, AttributeError, jax.errors.JaxRuntimeError) as e:
    return f'{spec.origin} does not go with this jaxlib: {e}'
  return ''


def values(a: jax.Array) -> jax.Array:
  """Levels as the library reads them: bfloat16 as it is, else float32."""
  return a if a.dtype == jnp.bfloat16 else a.astype(jnp.float32)
