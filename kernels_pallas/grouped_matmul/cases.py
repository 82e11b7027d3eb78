"""Shapes that every implementation is checked on, and those whose TPU schedules are counted."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul import tpu
from kernels_pallas.ternary_matmul.cases import Scheduled


class Case(NamedTuple):
  """Rows of each group, rows that belong to none, and the widths."""

  name: str
  sizes: tuple[int, ...]
  outside: int
  d: int
  f: int


CHECKED: tuple[Case, ...] = (
    Case('one_row', (0, 1), 0, 24, 40),
    Case('no_rows', (0, 0, 0), 9, 24, 40),
    Case('empty_groups', (3, 0, 5, 1), 7, 24, 40),
    Case('all_on_one', (600, 0, 0, 0), 0, 128, 128),
    Case('all_on_the_last', (0, 0, 0, 300), 5, 128, 256),
    Case('tails', (257, 31, 33, 300), 19, 136, 200),
    Case('nearly_even', (40, 30, 38, 32), 3, 72, 40),
    Case('whole_tiles', (128, 256, 128), 0, 128, 128),
    Case('every_block', (272, 193, 161, 33, 256, 0, 609, 97, 16), 3, 24, 16),
)


class Wide(NamedTuple):
  """A layer worth compiling and timing: m rows over e groups, d to f."""

  name: str
  m: int
  e: int
  d: int
  f: int


WIDE: tuple[Wide, ...] = (
    Wide('grin_up', 8192, 16, 4096, 6400),
    Wide('grin_down', 8192, 16, 6400, 4096),
    Wide('switch_base', 4096, 128, 768, 3072),
    Wide('switch_c', 2048, 64, 2080, 6144),
)


def scheduled() -> Iterator[Scheduled]:
  """A tile of rows of GRIN's up projection, few rows and many."""
  for m, e, d, f in ((128, 16, 4096, 6400), (8192, 16, 4096, 6400)):
    structs = (
        jax.ShapeDtypeStruct((m, d), jnp.bfloat16), jax.ShapeDtypeStruct((e, d, f), jnp.bfloat16),
        jax.ShapeDtypeStruct((e,), jnp.int32),
    )
    _, deep, wide = tpu.tiling(m, e, d, f, jnp.bfloat16)
    yield Scheduled(f'{tpu.row_tile(m, e)} rows, bfloat16', tpu.product, structs, deep * wide)
