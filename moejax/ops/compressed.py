"""expert_dot for weight nodes: one expert at a time is expanded, used for its tokens and dropped.

A single token goes through `kernels_pallas.subbit_matmul`, which expands nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.subbit_matmul import api as subbit
from moejax import weights
from moejax.codec import ternary_jax
from moejax.ops import expert_dot, grouped


@jax.custom_vjp
def compressed_expert_dot(x_md: jax.Array, node: Any, group_sizes_e: jax.Array) -> jax.Array:
  """`expert_dot` for any weight node; differentiable in x only (the node's arrays get zeros)."""
  if isinstance(node, weights.Ternary) and x_md.shape[0] == 1:
    y_f = ternary_matvec(x_md[0], node, jnp.argmax(group_sizes_e))
    return jnp.where(group_sizes_e.sum() > 0, y_f, 0.0).astype(x_md.dtype)[None]
  return grouped.grouped_matmul(
      x_md, lambda e: node.expert_rows(e, x_md.dtype), group_sizes_e, node.shape[2],
      transpose=True,
  )


def ternary_matvec(x_d: jax.Array, node: weights.Ternary, expert: jax.Array) -> jax.Array:
  """x W for one expert (traced index) of a Ternary node, straight from its codes: float32 [f]."""
  shard, offsets, table, levels = node.locate(expert)
  words, _, offsets = ternary_jax.window(jnp.asarray(node.words), shard, offsets, node.max_words)

  def matvec(design):
    codes = ternary_jax.decode_table(design)
    return lambda: subbit.subbit_matvec(
        x_d, words, offsets, levels, jnp.asarray(codes.length_u), jnp.asarray(codes.fields_ju),
        field_bits=codes.bits, block_rows=node.block_rows,
    )

  branches = [matvec(d) for d in node.designs]
  return branches[0]() if len(branches) == 1 else jax.lax.switch(table, branches)


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
