"""expert_dot for weight nodes: one expert at a time is expanded, used for its tokens and dropped."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import weights
from moejax.ops import expert_dot, grouped


@jax.custom_vjp
def compressed_expert_dot(x_md: jax.Array, node: Any, group_sizes_e: jax.Array) -> jax.Array:
  """`expert_dot` for any weight node; differentiable in x only (the node's arrays get zeros)."""
  return grouped.grouped_matmul(
      x_md, lambda e: node.expert_rows(e, x_md.dtype), group_sizes_e, node.shape[2],
      transpose=True,
  )


def _fwd(x_md, node, group_sizes_e):
  return compressed_expert_dot(x_md, node, group_sizes_e), (node, group_sizes_e)


def _zero_cotangent(leaf):
  if jnp.issubdtype(leaf.dtype, jnp.inexact):
    return jnp.zeros(leaf.shape, leaf.dtype)
  return np.zeros(leaf.shape, jax.dtypes.float0)


def _bwd(residuals, dy_mf):
  node, group_sizes_e = residuals
  dx_md = grouped.grouped_matmul(
      dy_mf, lambda e: node.expert_rows(e, dy_mf.dtype), group_sizes_e, node.shape[1]
  )
  return dx_md, jax.tree.map(_zero_cotangent, node), _zero_cotangent(group_sizes_e)


compressed_expert_dot.defvjp(_fwd, _bwd)

for _node_class in weights.NODE_CLASSES.values():
  expert_dot.register(_node_class)(compressed_expert_dot)
