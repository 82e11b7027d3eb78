"""Shapes that every implementation is checked on, and those whose TPU schedules are counted."""

from collections.abc import Iterator
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.subbit_matmul import layout, tpu
from kernels_pallas.ternary_matmul.cases import Scheduled


class Case(NamedTuple):
  """Rows of each group, rows that belong to none, widths, share of zeros, weights of a block.

  `spread`: the standard deviation of the share of zeros from output to output.
  """

  name: str
  sizes: tuple[int, ...]
  outside: int
  d: int
  f: int
  zero_share: float = 0.885
  block: int = 8
  spread: float = 0.0

  def signs(self) -> np.ndarray:
    """int8 [e, d, f]; one output has no high weight, one no weight at all."""
    rng = np.random.default_rng(len(self.name))
    zeros = np.clip(self.zero_share + self.spread * rng.normal(size=(1, 1, self.f)), 0, 1)
    shape = (len(self.sizes), self.d, self.f)
    signs = np.where(rng.random(shape) < zeros, 0, rng.choice([-1, 1], size=shape))
    if self.f > 3:
      signs[:, :, 1] = -np.abs(signs[:, :, 1])
      signs[:, :, 2] = 0
    return signs.astype(np.int8)


CHECKED: tuple[Case, ...] = (
    Case('one_weight', (1,), 0, 1, 1, 0.0),
    Case('one_row', (0, 1), 0, 24, 40),
    Case('no_rows', (0, 0, 0), 9, 24, 40),
    Case('empty_groups', (3, 0, 5, 1), 7, 300, 130),
    Case('all_on_one', (70, 0, 0), 0, 256, 128),
    Case('tails', (17, 1, 33), 3, 700, 700, spread=0.05),
    Case('two_strips', (2, 2), 0, 8300, 24),
    Case('five_tiles', (2,), 0, 256, 600, spread=0.1),
    Case('all_zero', (4, 4), 0, 100, 64, 1.0),
    Case('dense', (4, 12), 0, 512, 128, 0.0),
    Case('dense_of_4', (4, 12), 0, 300, 128, 0.0, block=4),
    Case('few_zeros', (3, 2), 1, 520, 130, 0.8, block=4),
    Case('many_zeros', (3, 2), 1, 520, 130, 0.95, block=16),
    Case('uneven', (2,), 0, 900, 260, 0.7, spread=0.3),
)

# Blocks of 8 of 4096 x 4096 weights of which 88.5 % are zeros, independent of each other: rows a
# tile, rows that a step's fields and entries reach over, patches a tile.
_ROWS, _REACH, _PATCHES = 90, (12, 10), 10


def scheduled() -> Iterator[Scheduled]:
  """Whole tiles of eight experts, with two levels an output and with one."""
  e, d, f = 8, 4096, 2048
  tiles = layout.tiles_of(f)
  sizes = layout.Sizes(d, f, 8, tiles * _ROWS, _REACH, tiles * _PATCHES)
  # Four tiles' patches, the groups of steps, and once an expert the moves of its outputs.
  rounds = -(-_PATCHES // layout.PATCHES_AT_ONCE)
  trips = (*[rounds] * tpu.TOGETHER, sizes.groups, tpu.TOGETHER)
  for m, dtype, of_levels in (
      (16, jnp.bfloat16, (2, 1)), (64, jnp.bfloat16, (2,)), (256, jnp.bfloat16, (2,)),
      (16, jnp.float32, (2,)),
  ):
    for levels in of_levels:
      structs = (
          jax.ShapeDtypeStruct((m, d), dtype),
          jax.ShapeDtypeStruct((e * sizes.deep, layout.LANES), jnp.uint32),
          jax.ShapeDtypeStruct((e, 1), jnp.int32),
          jax.ShapeDtypeStruct((e, 1, 1, sizes.record), jnp.int32),
          jax.ShapeDtypeStruct((e, levels, f), jnp.bfloat16),
          jax.ShapeDtypeStruct((e, tiles, layout.LANES), jnp.uint16),
          jax.ShapeDtypeStruct((e,), jnp.int32),
      )
      name = f'{m} rows, {jnp.dtype(dtype).name}, {levels} level{"s" if levels > 1 else ""}'
      yield Scheduled(
          name, functools.partial(tpu.subbit_matmul, sizes=sizes), structs,
          d * tpu.TOGETHER * layout.LANES, trips,
      )
