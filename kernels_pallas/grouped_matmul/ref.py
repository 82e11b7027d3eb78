"""Grouped matmul as a loop over the experts that have tokens, in two static row buckets.

Work and memory follow the tokens: an expert without tokens costs nothing, and no array of
[tokens, experts] or of all experts' outputs exists. `jax.lax.ragged_dot` on CPU computes every
expert for every token instead, so it is not used there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LARGE_ROWS = 256
SMALL_ROWS = 32


def row_buckets(rows: int) -> tuple[int, ...]:
  """Static block sizes for an input of `rows` rows, falling, without one that no group fills."""
  if rows < SMALL_ROWS:
    return (min(8, 1 << max(rows - 1, 0).bit_length()),)
  return (SMALL_ROWS,) if rows < LARGE_ROWS else (LARGE_ROWS, SMALL_ROWS)


def loop_over_experts(
    group_sizes_e: jax.Array,
    body: Callable[[jax.Array, jax.Array, jax.Array, Any], Any],
    carry: Any,
) -> Any:
  """Folds body(expert, start_row, rows, carry) over the experts with rows, in order."""
  ends_e = jnp.cumsum(group_sizes_e)
  active_e = jnp.argsort(group_sizes_e == 0, stable=True)

  def step(i, carry):
    e = active_e[i]
    return body(e, ends_e[e] - group_sizes_e[e], group_sizes_e[e], carry)

  return jax.lax.fori_loop(0, (group_sizes_e > 0).sum(), step, carry)


def loop_over_blocks(
    start: jax.Array, rows: jax.Array, buckets: tuple[int, ...],
    body: Callable[[jax.Array, jax.Array, int, Any], Any], carry: Any,
) -> Any:
  """Folds body(first_row, rows_left, static_size, carry) over one expert's rows.

  Full blocks of the larger sizes first; only the last block of all may reach past the rows.
  """
  done: Any = 0
  for size in buckets:
    left, begin = rows - done, start + done
    count = (left + size - 1) // size if size == buckets[-1] else left // size

    def block(j, c, left=left, begin=begin, size=size):
      return body(begin + j * size, left - j * size, size, c)

    carry = jax.lax.fori_loop(0, count, block, carry)
    done += count * size
  return carry


def grouped_matmul(
    x_md: jax.Array,
    get_expert: Callable[[jax.Array], jax.Array],
    group_sizes_e: jax.Array,
    out_dim: int,
    *,
    transpose: bool = False,
) -> jax.Array:
  """y[rows of e] = x[rows of e] @ get_expert(e), rows sorted by expert; returns [m, out_dim].

  Args:
    x_md: rows of expert 0 first, then 1, ...; rows past sum(group_sizes_e) give 0.
    get_expert: a traced expert index -> its matrix [d, f] ([f, d] with `transpose`). It is called
      once for each expert that has rows, so a compressed expert is expanded once and dropped.
    group_sizes_e: int32 rows of each expert.

  Accumulates in float32, returns x's dtype. Cost: 2 * m * d * f operations on rows rounded up to
  the small block, plus one read of each active expert.
  """
  m = x_md.shape[0]
  buckets = row_buckets(m)
  padded = jnp.pad(x_md, ((0, buckets[0]), (0, 0)))
  contract = (((1,), (1 if transpose else 0,)), ((), ()))

  def expert(e, start, rows, y):
    w = get_expert(e).astype(x_md.dtype)

    def block(first, left, size, y):
      x_block = jax.lax.dynamic_slice_in_dim(padded, first, size)
      y_block = jax.lax.dot_general(x_block, w, contract, preferred_element_type=jnp.float32)
      return jax.lax.dynamic_update_slice_in_dim(y, y_block.astype(y.dtype), first, 0)

    return loop_over_blocks(start, rows, buckets, block, y)

  # A block may spill rows past its group: the next group overwrites them, the mask ends the last.
  y = jnp.zeros((m + buckets[0], out_dim), x_md.dtype)
  y = loop_over_experts(group_sizes_e, expert, y)[:m]
  return jnp.where((jnp.arange(m) < group_sizes_e.sum())[:, None], y, jnp.zeros((), y.dtype))


def product(
    x_md: jax.Array, w_edf: jax.Array, group_sizes_e: jax.Array, *, transpose: bool = False
) -> jax.Array:
  """See `api.product`."""
  pick = lambda e: jax.lax.dynamic_index_in_dim(w_edf, e, 0, keepdims=False)
  return grouped_matmul(
      x_md, pick, group_sizes_e, w_edf.shape[1 if transpose else 2], transpose=transpose
  )


def outer(x_md: jax.Array, dy_mf: jax.Array, group_sizes_e: jax.Array, dtype: Any) -> jax.Array:
  """See `api.outer`."""
  m, d = x_md.shape
  f = dy_mf.shape[1]
  buckets = row_buckets(m)
  pad = ((0, buckets[0]), (0, 0))
  x_padded, dy_padded = jnp.pad(x_md, pad), jnp.pad(dy_mf, pad)

  def expert(e, start, rows, dw):
    def block(first, left, size, acc):
      x_block = jax.lax.dynamic_slice_in_dim(x_padded, first, size)
      dy_block = jax.lax.dynamic_slice_in_dim(dy_padded, first, size)
      own = (jnp.arange(size) < left)[:, None]
      x_block = jnp.where(own, x_block, jnp.zeros((), x_block.dtype))
      return acc + jax.lax.dot_general(
          x_block, dy_block, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
      )

    acc = loop_over_blocks(start, rows, buckets, block, jnp.zeros((d, f), jnp.float32))
    return jax.lax.dynamic_update_slice_in_dim(dw, acc.astype(dtype)[None], e, 0)

  return loop_over_experts(
      group_sizes_e, expert, jnp.zeros((group_sizes_e.shape[0], d, f), dtype)
  )
