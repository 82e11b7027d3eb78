"""Grouped matmul as a loop over the experts that have tokens, in static row buckets.

Work and memory follow the tokens: an expert without tokens costs nothing, and no array of
[tokens, experts] or of all experts' outputs exists. `jax.lax.ragged_dot` on CPU computes every
expert for every token instead, so it is not used there.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

# Many rows go in the largest of these blocks, what is left over in one of the others.
BLOCKS = (256, 192, 160, 128, 96, 64, 32, 16)
LARGE_ROWS, SMALL_ROWS = BLOCKS[0], BLOCKS[-1]
# Rows, and elements, of a matrix that is multiplied piece by piece.
PIECE, PIECE_ELEMENTS = 256, 800_000


def row_buckets(rows: int) -> tuple[int, ...]:
  """Static block sizes for an input of `rows` rows, falling, none larger than it."""
  if rows >= LARGE_ROWS:
    return BLOCKS
  # One size: a program for few rows had better be small.
  size = min(rows, 2 * SMALL_ROWS if rows >= 2 * SMALL_ROWS else 8)
  return (size,) if size else ()


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

  Full blocks of the largest size first, then one block of the smallest that holds what is left,
  which may reach past the rows, see `block_of`: a product of many rows takes less time than several
  of few, by more than the rows that it is too large for.

  Args:
    buckets: static sizes, falling.
  """

  def blocks(begin, left, size, count, carry):
    block = lambda j, c: body(begin + j * size, left - j * size, size, c)
    return jax.lax.fori_loop(0, count, block, carry)

  if not buckets:
    return carry
  largest, *smaller = buckets
  if not smaller:
    return blocks(start, rows, largest, (rows + largest - 1) // largest, carry)
  full = rows // largest
  carry = blocks(start, rows, largest, full, carry)
  begin, left = start + full * largest, rows - full * largest
  last = [
      functools.partial(blocks, begin, left, size, (left > 0).astype(jnp.int32))
      for size in reversed(buckets)
  ]
  return jax.lax.switch((left > jnp.array(smaller[::-1])).sum(), last, carry)


def block_of(
    first: jax.Array, left: jax.Array, size: int, total: int
) -> tuple[jax.Array, jax.Array]:
  """Where a block starts so that it lies within `total` rows, and which of its rows are its own."""
  start = jnp.minimum(first, total - size)
  row_m = start + jnp.arange(size)
  return start, ((row_m >= first) & (row_m < first + left))[:, None]


def in_blocks(
    x_md: jax.Array,
    product: Callable[[jax.Array, jax.Array], jax.Array],
    group_sizes_e: jax.Array,
    out_dim: int,
    blocks: tuple[int, ...] = (1, 8, 32, 128),
) -> jax.Array:
  """y[rows of e] = product(e, x[rows of e]), rows sorted by expert; returns [m, out_dim].

  For weights that each product decodes anew: an expert's rows go in the smallest of the block sizes
  that holds them, or in several of the largest. `product` gets [block, d] and gives float32
  [block, out_dim], rows of other experts among them.
  """
  m = x_md.shape[0]
  sizes = [*(size for size in blocks[:-1] if size < m), min(m, blocks[-1])]

  def expert(e, start, rows, y):
    def block(first, left, size, y):
      at, own = block_of(first, left, size, m)
      made = product(e, jax.lax.dynamic_slice_in_dim(x_md, at, size)).astype(y.dtype)
      made = jnp.where(own, made, jax.lax.dynamic_slice_in_dim(y, at, size))
      return jax.lax.dynamic_update_slice_in_dim(y, made, at, 0)

    branches = [
        functools.partial(loop_over_blocks, start, rows, (size,), block) for size in sizes
    ]
    least = sum((rows > size).astype(jnp.int32) for size in sizes[:-1])
    return jax.lax.switch(least, branches, y) if len(sizes) > 1 else branches[0](y)

  return loop_over_experts(group_sizes_e, expert, jnp.zeros((m, out_dim), x_md.dtype))


def piece_of(rows: int, wanted: int = PIECE) -> int:
  """Rows of a stored matrix that are multiplied at a time: a divisor near `wanted`, or all of them.

  XLA copies what it multiplies: a piece is copied into the cache, a whole matrix through memory.
  """
  if wanted >= rows:
    return rows
  near = [n for n in range(max(wanted // 2, 1), 2 * wanted + 1) if rows % n == 0]
  return min(near, key=lambda n: abs(math.log(n / wanted)), default=rows)


def grouped_matmul(
    x_md: jax.Array,
    get_rows: Callable[[jax.Array, jax.Array | int], jax.Array],
    group_sizes_e: jax.Array,
    out_dim: int,
    *,
    piece: int | None = None,
    transpose: bool = False,
) -> jax.Array:
  """y[rows of e] = x[rows of e] w_e, rows sorted by expert; returns [m, out_dim].

  Args:
    x_md: rows of expert 0 first, then 1, ...; rows past sum(group_sizes_e) give 0.
    get_rows: expert e and i (traced) -> rows i piece to (i + 1) piece of its stored matrix, which
      is w_e [d, f], or with `transpose` its transpose [f, d].
    group_sizes_e: int32 rows of each expert.
    piece: divides the rows of the stored matrix; None for all of them, which are then made once
      for each expert that has rows, and else once for each of its blocks.

  Accumulates in float32, returns x's dtype. Cost: 2 * m * d * f operations on rows rounded up to
  the small block, plus one read of each active expert.
  """
  m, d = x_md.shape
  buckets = row_buckets(m)
  stored = out_dim if transpose else d
  size = piece or stored
  pieces = stored // size
  contract = (((1,), (1 if transpose else 0,)), ((), ()))
  dot = functools.partial(
      jax.lax.dot_general, dimension_numbers=contract, preferred_element_type=jnp.float32
  )

  def in_pieces(x_block, e):
    def add(i, y_block):
      w = get_rows(e, i).astype(x_block.dtype)
      if transpose:
        return jax.lax.dynamic_update_slice_in_dim(y_block, dot(x_block, w), i * size, 1)
      return y_block + dot(jax.lax.dynamic_slice_in_dim(x_block, i * size, size, 1), w)

    return jax.lax.fori_loop(0, pieces, add, jnp.zeros((len(x_block), out_dim), jnp.float32))

  def expert(e, start, rows, y):
    whole: Any = get_rows(e, 0).astype(x_md.dtype) if pieces == 1 else None

    def block(first, left, count, y):
      at, own = block_of(first, left, count, m)
      x_block = jax.lax.dynamic_slice_in_dim(x_md, at, count)
      y_block = in_pieces(x_block, e) if pieces > 1 else dot(x_block, whole)
      y_block = jnp.where(
          own, y_block.astype(y.dtype), jax.lax.dynamic_slice_in_dim(y, at, count)
      )
      return jax.lax.dynamic_update_slice_in_dim(y, y_block, at, 0)

    return loop_over_blocks(start, rows, buckets, block, y)

  return loop_over_experts(group_sizes_e, expert, jnp.zeros((m, out_dim), x_md.dtype))


def product(
    x_md: jax.Array, w_edf: jax.Array, group_sizes_e: jax.Array, *, transpose: bool = False
) -> jax.Array:
  """See `api.product`."""
  _, d, f = w_edf.shape
  piece = piece_of(d, max(PIECE_ELEMENTS // max(f, 1), SMALL_ROWS))
  rows = lambda e, i: jax.lax.dynamic_slice(w_edf, (e, i * piece, 0), (1, piece, f))[0]
  return grouped_matmul(
      x_md, rows, group_sizes_e, d if transpose else f, piece=piece, transpose=transpose
  )


def outer(x_md: jax.Array, dy_mf: jax.Array, group_sizes_e: jax.Array, dtype: Any) -> jax.Array:
  """See `api.outer`. Groups of nearly even sizes are padded to one, and are one batched product."""
  evens = even_sizes(x_md.shape[0], group_sizes_e.shape[0])
  if not evens:
    return _outer_in_blocks(x_md, dy_mf, group_sizes_e, dtype)
  branches = [functools.partial(_outer_padded, rows=rows, dtype=dtype) for rows in evens]
  branches.append(functools.partial(_outer_in_blocks, dtype=dtype))
  least = (group_sizes_e.max() > jnp.array(evens)).sum()
  return jax.lax.switch(least, branches, x_md, dy_mf, group_sizes_e)


def even_sizes(rows: int, groups: int) -> tuple[int, ...]:
  """Rows to which nearly even groups are padded, rising.

  None where groups have few rows, or so many that full blocks are as quick.
  """
  mean = rows / groups
  if not 2 * SMALL_ROWS <= mean <= LARGE_ROWS:
    return ()
  return tuple(16 * math.ceil(mean * factor / 16) for factor in (1.25, 1.5, 2.0))


def _outer_padded(x_md, dy_mf, group_sizes_e, rows, dtype):
  starts_e = jnp.cumsum(group_sizes_e) - group_sizes_e
  place_er = starts_e[:, None] + jnp.arange(rows)[None]
  own_er = jnp.arange(rows)[None] < group_sizes_e[:, None]
  gather = lambda a: a.at[place_er].get(mode='clip')
  x_erd = jnp.where(own_er[..., None], gather(x_md), jnp.zeros((), x_md.dtype))
  return jax.lax.dot_general(
      x_erd, gather(dy_mf), (((1,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32
  ).astype(dtype)


def _outer_in_blocks(x_md, dy_mf, group_sizes_e, dtype):
  m, d = x_md.shape
  f = dy_mf.shape[1]
  buckets = row_buckets(m)

  def expert(e, start, rows, dw):
    def block(first, left, size, acc):
      at, own = block_of(first, left, size, m)
      x_block = jax.lax.dynamic_slice_in_dim(x_md, at, size)
      x_block = jnp.where(own, x_block, jnp.zeros((), x_block.dtype))
      dy_block = jax.lax.dynamic_slice_in_dim(dy_mf, at, size)
      return acc + jax.lax.dot_general(
          x_block, dy_block, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
      )

    acc = loop_over_blocks(start, rows, buckets, block, jnp.zeros((d, f), jnp.float32))
    return jax.lax.dynamic_update_slice_in_dim(dw, acc.astype(dtype)[None], e, 0)

  return loop_over_experts(
      group_sizes_e, expert, jnp.zeros((group_sizes_e.shape[0], d, f), dtype)
  )
