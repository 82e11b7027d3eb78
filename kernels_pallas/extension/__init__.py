"""Products in C++, for CPUs, where they were built; XLA serves where they were not.

`setup.py` compiles the `.cc` files of this package and of the operations into one library,
`kernels_pallas._cpu`, which XLA calls by its foreign function interface. `gemm` multiplies
matrices, `sums` adds up rows of x, `work` shares work between threads.

The environment variable MOEJAX_CPU says what is used: 'xla' for none of it, 'avx512', 'avx2' or
'any' for one kind of CPU's products of matrices ('any' too where the CPU is not of that kind). By
default the best that the CPU has. Programs for `jax.export` had better be traced with 'xla': it
refuses to write foreign calls.
"""

from collections.abc import Callable
import ctypes
import functools
import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp

ATTENTION = 'moejax_attention'
ATTENTION_GRADIENTS = 'moejax_attention_gradients'
SUBBIT_MATMUL = 'moejax_subbit_matmul'
CODEWORD_MATMUL = 'moejax_codeword_matmul'
CHOSEN_UP = 'moejax_chosen_up'
CHOSEN_DOWN = 'moejax_chosen_down'
GROUPED_PRODUCT = 'moejax_grouped_product'
GROUPED_OUTER = 'moejax_grouped_outer'
PACKED_MATMUL = 'moejax_packed_matmul'
TERNARY_MATMUL = 'moejax_ternary_matmul'
KINDS = ('avx512', 'avx2', 'any')
FUNCTIONS = (
    ATTENTION, ATTENTION_GRADIENTS, CHOSEN_UP, CHOSEN_DOWN, SUBBIT_MATMUL, CODEWORD_MATMUL,
    GROUPED_PRODUCT, GROUPED_OUTER, PACKED_MATMUL, TERNARY_MATMUL,
)


@functools.cache
def missing() -> str:
  """'' where the library is in use, or why it is not; registers its functions once.

  Raises:
    ValueError: MOEJAX_CPU is none of its values.
  """
  asked = os.environ.get('MOEJAX_CPU', '')
  if asked not in ('', 'xla', *KINDS):
    raise ValueError(f'MOEJAX_CPU={asked} is none of xla, {", ".join(KINDS)}')
  if asked == 'xla':
    return 'MOEJAX_CPU=xla turns the CPU extension off'
  spec = importlib.util.find_spec('kernels_pallas._cpu')
  if spec is None or spec.origin is None:
    return 'kernels_pallas is without its CPU extension; setup.py builds it with a C++ compiler'
  try:
    library = ctypes.CDLL(spec.origin)
    for name in FUNCTIONS:
      jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform='cpu')
  except (OSError, AttributeError, jax.errors.JaxRuntimeError) as e:
    return f'{spec.origin} does not go with this jaxlib: {e}'
  return ''


def values(a: jax.Array) -> jax.Array:
  """Levels as the library reads them: bfloat16 as it is, else float32."""
  return a if a.dtype == jnp.bfloat16 else a.astype(jnp.float32)


def call(name: str, out: Any) -> Callable[..., Any]:
  """The function of the library that returns `out`, a ShapeDtypeStruct or several of them.

  Raises:
    RuntimeError: the library is missing.
  """
  if reason := missing():
    raise RuntimeError(reason)
  return jax.ffi.ffi_call(name, out, vmap_method='sequential')


def without(*dtypes: Any) -> str:
  """'' where the library is in use and multiplies arrays of these types, or why it does not."""
  if reason := missing():
    return reason
  known = (jnp.float32, jnp.bfloat16)
  other = [dtype for dtype in map(jnp.dtype, dtypes) if dtype not in known]
  return f'{other[0]} is neither float32 nor bfloat16' if other else ''
