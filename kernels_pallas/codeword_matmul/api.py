"""The entries to products from codewords, and their cost."""

from typing import NamedTuple

import jax

from kernels_pallas import extension
from kernels_pallas.codeword_matmul import cpu, ref


class Cost(NamedTuple):
  """Bytes read and written and operations of one product."""

  bytes_moved: float
  flops: float


def codeword_matvec(
    x_c: jax.Array, words_w: jax.Array, offsets_b: jax.Array, levels_r2: jax.Array,
    length_u: jax.Array, fields_ju: jax.Array, *, field_bits: int, max_length: int,
    block_rows: int,
) -> jax.Array:
  """W x for one ternary matrix in codewords, float32 [rows], in XLA on every device.

  See the package for the arguments.
  """
  return ref.codeword_matvec(
      x_c, words_w, offsets_b, levels_r2, length_u, fields_ju, field_bits=field_bits,
      max_length=max_length, block_rows=block_rows,
  )


def supports() -> str:
  """'' where CPUs multiply by experts' codewords, or why they do not."""
  return extension.missing()


def codeword_matmul(
    x_md: jax.Array, words_sw: jax.Array, offsets_eb: jax.Array, table_e: jax.Array,
    levels_er2: jax.Array, entries_tuk: jax.Array, group_sizes_e: jax.Array, *, block_rows: int,
) -> jax.Array:
  """y[rows of e] = x[rows of e] W_e^T, [m, rows of W] in x's dtype, summed in float32; on CPUs.

  Rows past the groups give 0. See the package for the arguments, and ask `supports` first.

  Raises:
    ValueError: shapes that do not fit.
  """
  (experts, offsets), (shards, _) = offsets_eb.shape, words_sw.shape
  rows = levels_er2.shape[1]
  fits = (
      shards >= 1 and offsets == -(-rows // block_rows) + 1 and table_e.shape == (experts,)
      and levels_er2.shape == (experts, rows, 2) and entries_tuk.shape[1] == 1 << 16
      and group_sizes_e.shape == (experts,)
  )
  if not fits:
    raise ValueError(
        f'codeword_matmul: words {words_sw.shape}, offsets {offsets_eb.shape}, table '
        f'{table_e.shape}, levels {levels_er2.shape}, entries {entries_tuk.shape} and group sizes '
        f'{group_sizes_e.shape} do not fit blocks of {block_rows} rows'
    )
  return cpu.codeword_matmul(
      x_md, words_sw, offsets_eb, table_e, levels_er2, entries_tuk, group_sizes_e,
      block_rows=block_rows,
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
