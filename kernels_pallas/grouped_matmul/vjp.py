"""The grouped product with its gradients."""

import jax
import numpy as np

from kernels_pallas.grouped_matmul import api


@jax.custom_vjp
def grouped_matmul(x_md: jax.Array, w_edf: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
  """`api.product`, differentiable in x and w. Rows past the sum of the sizes get no gradient."""
  return api.product(x_md, w_edf, group_sizes_e)


def _fwd(x_md, w_edf, group_sizes_e):
  return api.product(x_md, w_edf, group_sizes_e), (x_md, w_edf, group_sizes_e)


def _bwd(residuals, dy_mf):
  x_md, w_edf, group_sizes_e = residuals
  dx_md = api.product(dy_mf, w_edf, group_sizes_e, transpose=True)
  # The weights are read for the last time before their gradient is there: else XLA, which may put
  # an update in their place as soon as it is, keeps a copy of all of them for dx.
  dx_md, x_md = jax.lax.optimization_barrier((dx_md, x_md))
  return (
      dx_md,
      api.outer(x_md, dy_mf, group_sizes_e, w_edf.dtype),
      np.zeros(group_sizes_e.shape, jax.dtypes.float0),
  )


grouped_matmul.defvjp(_fwd, _bwd)
