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
  return (
      api.product(dy_mf, w_edf, group_sizes_e, transpose=True),
      api.outer(x_md, dy_mf, group_sizes_e, w_edf.dtype),
      np.zeros(group_sizes_e.shape, jax.dtypes.float0),
  )


grouped_matmul.defvjp(_fwd, _bwd)
