"""The entry to the product from codewords: picks an implementation, states its cost."""

from typing import NamedTuple

import jax

from kernels_pallas.codeword_matvec import ref


class Cost(NamedTuple):
  """Bytes read and written and operations of one product."""

  bytes_moved: float
  flops: float


def codeword_matvec(
    x_c: jax.Array, words_w: jax.Array, offsets_b: jax.Array, levels_r2: jax.Array,
    length_u: jax.Array, fields_ju: jax.Array, *, field_bits: int, max_length: int,
    block_rows: int,
) -> jax.Array:
  """W x for one ternary matrix in codewords, float32 [rows]; see the package for the arguments.

  The XLA implementation serves every device: no hardware kernel is registered.
  """
  return ref.codeword_matvec(
      x_c, words_w, offsets_b, levels_r2, length_u, fields_ju, field_bits=field_bits,
      max_length=max_length, block_rows=block_rows,
  )


def cost(rows: int, cols: int, bits_per_weight: float, zero_share: float) -> Cost:
  """What one product moves and does: codes once, x once, y once; an add for each nonzero.

  bytes = rows * cols * bits / 8 + 4 * (cols + rows); flops = rows * cols * (1 - zeros) + 4 * rows.
  """
  weights = rows * cols
  return Cost(
      bytes_moved=weights * bits_per_weight / 8 + 4 * (rows + cols),
      flops=weights * (1 - zero_share) + 4 * rows,
  )
