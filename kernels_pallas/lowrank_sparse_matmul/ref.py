"""The product in plain XLA, for CPUs: an expert's rows in blocks, the small work only."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul import ref as grouped


def _pick(stack: jax.Array, e: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(stack, e, 0, keepdims=False).astype(dtype)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
  """In float32, which XLA's CPU products of bfloat16 are anyway, those that it has."""
  return jnp.matmul(x.astype(jnp.float32), w.astype(jnp.float32))


def _grouped(
    rows_mx: tuple[jax.Array, ...], f: int, group_sizes_e: jax.Array,
    expert: Callable[[jax.Array], Callable[..., jax.Array]],
) -> jax.Array:
  """[m, f]: expert(e) is a function of the rows of each array that gives float32 [rows, f]."""
  m, dtype = len(rows_mx[0]), rows_mx[0].dtype
  buckets = grouped.row_buckets(m)

  def own_rows(e, start, rows, y):
    product = expert(e)

    def block(first, left_over, size, y):
      at, own = grouped.block_of(first, left_over, size, m)
      made = product(*(jax.lax.dynamic_slice_in_dim(x, at, size) for x in rows_mx))
      made = jnp.where(own, made.astype(y.dtype), jax.lax.dynamic_slice_in_dim(y, at, size))
      return jax.lax.dynamic_update_slice_in_dim(y, made, at, 0)

    return grouped.loop_over_blocks(start, rows, buckets, block, y)

  return grouped.loop_over_experts(group_sizes_e, own_rows, jnp.zeros((m, f), dtype))


def _expanded(low, kept, right, index) -> jax.Array:
  made = _dot(low, right)
  return made.at[:, index].add(kept.astype(made.dtype), mode='drop')


def lowrank_sparse_matmul(
    x_md: jax.Array, left_edr: jax.Array, right_erf: jax.Array, kept_eds: jax.Array,
    index_es: jax.Array, group_sizes_e: jax.Array,
) -> jax.Array:
  """See `api.lowrank_sparse_matmul`."""

  def expert(e):
    left, right, kept = (_pick(a, e, x_md.dtype) for a in (left_edr, right_erf, kept_eds))
    index = _pick(index_es, e, jnp.int32)
    return lambda x: _expanded(_dot(x, left).astype(x.dtype), _dot(x, kept), right, index)

  return _grouped((x_md,), right_erf.shape[2], group_sizes_e, expert)


def expand(
    low_mr: jax.Array, kept_ms: jax.Array, right_erf: jax.Array, index_es: jax.Array,
    group_sizes_e: jax.Array,
) -> jax.Array:
  """See `api.expand`."""

  def expert(e):
    right, index = _pick(right_erf, e, low_mr.dtype), _pick(index_es, e, jnp.int32)
    return lambda low, kept: _expanded(low, kept, right, index)

  return _grouped((low_mr, kept_ms), right_erf.shape[2], group_sizes_e, expert)
