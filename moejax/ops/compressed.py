"""expert_dot for weight nodes: one expert at a time is expanded, used for its tokens and dropped.

A single token goes through codewords by `kernels_pallas.codeword_matmul`, which expands nothing; a
low rank and a few columns are never expanded either.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.codeword_matmul import api as codewords
from kernels_pallas.grouped_matmul import ref as grouped
from kernels_pallas.lowrank_sparse_matmul import api as low_rank_sparse
from kernels_pallas.packed_matmul import api as packed
from kernels_pallas.subbit_matmul import api as sub_bit
from kernels_pallas.ternary_matmul import api as two_bit
from moejax import weights
from moejax.codec import ternary_jax
from moejax.ops import expert_dot


@jax.custom_vjp
def compressed_expert_dot(x_md: jax.Array, node: Any, group_sizes_e: jax.Array) -> jax.Array:
  """`expert_dot` for any weight node; differentiable in x and in the node's levels or scales."""
  if isinstance(node, weights.Ternary):
    return ternary_dot(x_md, node, group_sizes_e)
  if isinstance(node, weights.PackedTernary):
    return two_bit.ternary_matmul(
        x_md, jnp.asarray(node.words), jnp.asarray(node.levels), group_sizes_e
    )
  if isinstance(node, weights.BlockTernary):
    return sub_bit.subbit_matmul(x_md, *node.arrays(), group_sizes_e, node.sizes)
  if isinstance(node, weights.LowRankSparse):
    return low_rank_sparse_dot(x_md, node, group_sizes_e)
  if isinstance(node, weights.Packed):
    return packed.packed_matmul(
        x_md, jnp.asarray(node.words), jnp.asarray(node.scale), jnp.asarray(node.zero),
        group_sizes_e, bits=node.width, group_size=node.group_size,
    )
  return expanded_dot(x_md, node, group_sizes_e)


def expanded_dot(x_md: jax.Array, node: Any, group_sizes_e: jax.Array) -> jax.Array:
  """One expert at a time is expanded whole."""
  return grouped.grouped_matmul(
      x_md, lambda e, _: node.expert_rows(e, x_md.dtype), group_sizes_e, node.shape[2],
      transpose=True,
  )


def low_rank_sparse_dot(
    x_md: jax.Array, node: weights.LowRankSparse, group_sizes_e: jax.Array
) -> jax.Array:
  """See `kernels_pallas.lowrank_sparse_matmul`; kept columns that are a node go by their own."""
  left, right, index = (jnp.asarray(a) for a in (node.left, node.right, node.index))
  if not isinstance(node.kept, weights.WeightNode):
    return low_rank_sparse.lowrank_sparse_matmul(
        x_md, left, right, jnp.asarray(node.kept), index, group_sizes_e
    )
  low_mr = expert_dot.expert_dot(x_md, left, group_sizes_e)
  kept_ms = compressed_expert_dot(x_md, node.kept, group_sizes_e)
  return low_rank_sparse.expand(low_mr, kept_ms, right, index, group_sizes_e)


def ternary_dot(
    x_md: jax.Array, node: weights.Ternary, group_sizes_e: jax.Array
) -> jax.Array:
  """From the codewords on CPUs and for one row, else expert by expert expanded."""

  def from_codewords(x_md, node, group_sizes_e):
    return codewords.codeword_matmul(
        x_md, jnp.asarray(node.words), jnp.asarray(node.offsets), node.tables(),
        jnp.asarray(node.levels), jnp.asarray(ternary_jax.entries(node.designs)), group_sizes_e,
        block_rows=node.block_rows,
    )

  def one_row(x_1d, node, group_sizes_e):
    y_f = ternary_matvec(x_1d[0], node, jnp.argmax(group_sizes_e))
    return jnp.where(group_sizes_e.sum() > 0, y_f, 0.0).astype(x_1d.dtype)[None]

  by_xla = one_row if x_md.shape[0] == 1 else expanded_dot
  if codewords.supports():
    return by_xla(x_md, node, group_sizes_e)
  return jax.lax.platform_dependent(
      x_md, node, group_sizes_e, cpu=from_codewords, default=by_xla
  )


def ternary_matvec(x_d: jax.Array, node: weights.Ternary, expert: jax.Array) -> jax.Array:
  """x W for one expert (traced index) of a Ternary node, straight from its codes: float32 [f]."""
  shard, offsets, table, levels = node.locate(expert)
  words, _, offsets = ternary_jax.window(jnp.asarray(node.words), shard, offsets, node.max_words)

  def matvec(design):
    codes = ternary_jax.decode_table(design)
    return lambda: codewords.codeword_matvec(
        x_d, words, offsets, levels, jnp.asarray(codes.length_u), jnp.asarray(codes.fields_ju),
        field_bits=codes.bits, max_length=int(codes.length_u.max()), block_rows=node.block_rows,
    )

  branches = [matvec(d) for d in node.designs]
  return branches[0]() if len(branches) == 1 else jax.lax.switch(table, branches)


def _fwd(x_md, node, group_sizes_e):
  return compressed_expert_dot(x_md, node, group_sizes_e), (x_md, node, group_sizes_e)


def _bwd(residuals, dy_mf):
  x_md, node, group_sizes_e = residuals
  dx_md = grouped.grouped_matmul(
      dy_mf, lambda e, _: node.expert_rows(e, dy_mf.dtype), group_sizes_e, node.shape[1]
  )
  dnode = node_gradient(x_md, node, group_sizes_e, dy_mf)
  return dx_md.astype(x_md.dtype), dnode, np.zeros(group_sizes_e.shape, jax.dtypes.float0)


def node_gradient(x_md: jax.Array, node: Any, group_sizes_e: jax.Array, dy_mf: jax.Array) -> Any:
  """Gradient in a node's floating arrays (levels, scales), codes held fixed: a node of cotangents.

  One expert's weight gradient [f, d] is alive at a time. XLA drops the loop if nothing uses it.
  """
  leaves, structure = jax.tree.flatten(node)
  floating = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
  floats = [jnp.asarray(a, jnp.float32) for a, is_float in zip(leaves, floating) if is_float]
  m = x_md.shape[0]
  buckets = grouped.row_buckets(m)

  def rows_of(e, floats):
    values = iter(floats)
    filled = [next(values) if f else leaf for f, leaf in zip(floating, leaves)]
    return jax.tree.unflatten(structure, filled).expert_rows(e, jnp.float32)

  def expert(e, start, rows, sums):
    def block(first, left, size, acc):
      at, own = grouped.block_of(first, left, size, m)
      x_block = jax.lax.dynamic_slice_in_dim(x_md, at, size)
      dy_block = jax.lax.dynamic_slice_in_dim(dy_mf.astype(x_md.dtype), at, size)
      dy_block = jnp.where(own, dy_block, jnp.zeros((), dy_block.dtype))
      return acc + jax.lax.dot_general(
          dy_block, x_block, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
      )

    zeros = jnp.zeros((node.shape[2], node.shape[1]), jnp.float32)
    dw_fd = grouped.loop_over_blocks(start, rows, buckets, block, zeros)
    _, pull = jax.vjp(lambda values: rows_of(e, values), floats)
    return jax.tree.map(jnp.add, sums, pull(dw_fd)[0])

  sums = iter(
      grouped.loop_over_experts(group_sizes_e, expert, [jnp.zeros_like(a) for a in floats])
  )
  return jax.tree.unflatten(structure, [
      next(sums).astype(leaf.dtype) if f else np.zeros(leaf.shape, jax.dtypes.float0)
      for f, leaf in zip(floating, leaves)
  ])


compressed_expert_dot.defvjp(_fwd, _bwd)

for _node_class in weights.NODE_CLASSES.values():
  expert_dot.register(_node_class)(compressed_expert_dot)
