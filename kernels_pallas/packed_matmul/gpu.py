"""The product on GPUs: expanded experts by XLA, and a Mosaic GPU kernel, see `hopper`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import hopper
from kernels_pallas.grouped_matmul import ref as grouped
from kernels_pallas.packed_matmul import layout


def packed_matmul(
    x_md: jax.Array, words_ewf: jax.Array, scale_efg: jax.Array, zero_efg: jax.Array,
    group_sizes_e: jax.Array, *, bits: int, group_size: int = 0,
) -> jax.Array:
  """See `api.packed_matmul`: one expert at a time is expanded, used for its rows and dropped."""
  d = x_md.shape[1]
  pick = lambda a, e: jax.lax.dynamic_index_in_dim(a, e, 0, keepdims=False)

  def expert(e, _):
    words, scale, zero = (pick(a, e) for a in (words_ewf, scale_efg, zero_efg))
    return layout.inputs_at(words, scale, zero, d, bits, group_size, 0, d, x_md.dtype)

  return grouped.grouped_matmul(x_md, expert, group_sizes_e, words_ewf.shape[2])


def supports(m: int, d: int, f: int, e: int, dtype: Any, bits: int, group_size: int) -> str:
  """'' if `mosaic_packed_matmul` takes such a product, or why not."""
  least = 32 * hopper.ALIGNED // min(layout.FIELDS[bits])
  if d % least:
    return f'{d} inputs, with {bits} bits the kernel takes multiples of {least}'
  if group_size:
    return f'groups of {group_size} inputs, the kernel is for one scale an output'
  return hopper.supports(m, f, e, dtype)


def mosaic_packed_matmul(
    x_md: jax.Array, words_ewf: jax.Array, scale_efg: jax.Array, zero_efg: jax.Array,
    group_sizes_e: jax.Array, *, bits: int, group_size: int = 0, interpret: Any = None,
) -> jax.Array:
  """See `api.packed_matmul`: x W = scale (x symbols - zero sum(x)), a product for each field.

  Args:
    interpret: see `hopper.products`.

  Raises:
    ValueError: what `supports` does not take.
  """
  (m, d), (e, _, f) = x_md.shape, words_ewf.shape
  if reason := supports(m, d, f, e, x_md.dtype, bits, group_size):
    raise ValueError(f'mosaic_packed_matmul: {reason}')
  tiles = hopper.tiles(m, group_sizes_e, 32 // min(layout.FIELDS[bits]))
  x_ird = tiles.of(x_md)
  sum_mf = jnp.zeros((m, f), jnp.float32)
  first = done = 0
  for field in layout.FIELDS[bits]:

    def decode(words, part, field=field):
      symbols = (words >> np.uint32(field * part)) & np.uint32((1 << field) - 1)
      return [symbols.astype(jnp.int32).astype(jnp.float32).astype(jnp.bfloat16)]

    parts = 32 // field
    products_isfr = hopper.products(
        _by_part(x_ird, parts), words_ewf, tiles.expert_i, decode, parts=parts, first=first,
        interpret=interpret,
    )
    sum_mf = sum_mf + (1 << done) * tiles.rows(products_isfr)[:, 0]
    first, done = first + -(-d // parts), done + field
  scale_mf, zero_mf = (
      a.astype(jnp.float32)[..., 0][tiles.expert_m] for a in (scale_efg, zero_efg)
  )
  total_m1 = x_md.astype(jnp.float32).sum(1, keepdims=True)
  y_mf = scale_mf * (sum_mf - zero_mf * total_m1)
  return jnp.where(tiles.inside_m[:, None], y_mf, 0).astype(x_md.dtype)


def _by_part(x_ird: jax.Array, parts: int) -> jax.Array:
  """x as `hopper.products` wants it: of a block the first inputs of its words, the second, ..."""
  i, rows, d = x_ird.shape
  block = parts * hopper.WORDS
  x = jnp.pad(x_ird, ((0, 0), (0, 0), (0, -d % block)))
  x = x.reshape(i, rows, -1, hopper.WORDS, parts).swapaxes(3, 4)
  return x.reshape(i, rows, -1)
