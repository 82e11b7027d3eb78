"""Shapes that every implementation is checked on, and those whose TPU schedules are counted."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.ternary_matmul import layout, tpu


class Case(NamedTuple):
  """Rows of each group, rows that belong to none, the widths, and the share of zeros."""

  name: str
  sizes: tuple[int, ...]
  outside: int
  d: int
  f: int
  zero_share: float = 0.885


CHECKED: tuple[Case, ...] = (
    Case('one_weight', (1,), 0, 1, 1, 0.0),
    Case('one_row', (0, 1), 0, 24, 40),
    Case('no_rows', (0, 0, 0), 9, 24, 40),
    Case('empty_groups', (3, 0, 5, 1), 7, 300, 130),
    Case('all_on_one', (200, 0, 0), 0, 256, 128),
    Case('all_on_the_last', (0, 0, 150), 5, 128, 256),
    Case('tails', (17, 1, 33), 3, 700, 520),
    Case('many_inputs', (2, 2), 0, 4500, 24),
    Case('all_zero', (4, 4), 0, 100, 64, 1.0),
    Case('dense', (4, 12), 0, 512, 128, 0.0),
    Case('sixty_four', (30, 34), 0, 256, 1100),
    Case('five_hundred', (212, 200, 100), 0, 256, 64),
)


class Scheduled(NamedTuple):
  """A product to compile: a function, the shapes of its arguments, and a grid step's weights.

  `trips`: how often a grid step goes round each of its loops.
  """

  name: str
  function: Any
  structs: tuple[Any, ...]
  step_weights: int
  trips: tuple[float, ...] = ()


def scheduled() -> Iterator[Scheduled]:
  """Whole tiles of eight experts, with two levels an output and with one."""
  e, d, f = 8, 4096, 2048
  for m, dtype in ((16, jnp.bfloat16), (64, jnp.bfloat16), (512, jnp.bfloat16), (16, jnp.float32)):
    rows = min(m, tpu.MOST_ROWS) * (3 if dtype == jnp.float32 else 1)
    weights = tpu.depth(d) * layout.CHUNK * tpu.width(f, rows)
    for levels in (2, 1):
      structs = (
          jax.ShapeDtypeStruct((m, d), dtype),
          jax.ShapeDtypeStruct((e, layout.words_of(d), f), jnp.uint32),
          jax.ShapeDtypeStruct((e, levels, f), jnp.float32),
          jax.ShapeDtypeStruct((e,), jnp.int32),
      )
      name = f'{m} rows, {jnp.dtype(dtype).name}, {levels} level{"s" if levels > 1 else ""}'
      yield Scheduled(name, tpu.ternary_matmul, structs, weights)
