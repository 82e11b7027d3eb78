"""Shapes that every implementation is checked on, and those whose TPU schedules are counted."""

from collections.abc import Iterator
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.packed_matmul import layout, tpu
from kernels_pallas.ternary_matmul.cases import Scheduled


class Case(NamedTuple):
  """Rows of each group, rows that belong to none, the widths, bits, inputs that share a scale."""

  name: str
  sizes: tuple[int, ...]
  outside: int
  d: int
  f: int
  bits: int
  group_size: int = 0


CHECKED: tuple[Case, ...] = (
    Case('one_weight', (1,), 0, 1, 1, 2),
    Case('one_row', (0, 1), 0, 24, 40, 3),
    Case('no_rows', (0, 0, 0), 9, 24, 40, 4),
    Case('empty_groups', (3, 0, 5, 1), 7, 300, 130, 8),
    Case('all_on_one', (200, 0, 0), 0, 256, 128, 4),
    Case('all_on_the_last', (0, 0, 150), 5, 128, 256, 3),
    Case('tails', (17, 1, 33), 3, 700, 520, 3),
    Case('odd_eight', (2, 3), 1, 333, 24, 8),
    Case('many_inputs', (2, 2), 0, 4500, 24, 2),
    Case('rounds_of_eight', (3, 2), 0, 4096, 24, 4),
    Case('groups_of_128', (4, 0, 5), 2, 1024, 130, 4, 128),
    Case('three_bits_of_128', (4, 5), 0, 1024, 24, 3, 128),
    Case('groups_of_32', (2, 7), 0, 520, 40, 4, 32),
    Case('groups_of_512', (2, 7), 0, 2100, 40, 2, 512),
    Case('eight_bits_of_256', (2, 7), 0, 512, 40, 8, 256),
    Case('groups_of_100', (2, 7), 0, 300, 40, 4, 100),
    Case('five_hundred', (212, 200, 100), 0, 256, 64, 4),
)


def scheduled() -> Iterator[Scheduled]:
  """Whole tiles of eight experts by width and rows, and 4 bits in groups of 128."""
  e, d, f = 8, 4096, 2048
  for m, bits, group_size in ((16, 3, 0), (16, 4, 0), (16, 8, 0), (16, 4, 128), (512, 4, 0)):
    own = tpu.fields(d, bits, group_size)
    levels = jax.ShapeDtypeStruct((e, f, layout.groups(d, group_size)), jnp.bfloat16)
    structs = (
        jax.ShapeDtypeStruct((m, d), jnp.bfloat16),
        jax.ShapeDtypeStruct((e, layout.words_per_column(d, bits), f), jnp.uint32),
        levels, levels, jax.ShapeDtypeStruct((e,), jnp.int32),
    )
    loops = [
        field.chunks / tpu.together(field) for field in own if field.chunks > tpu.together(field)
    ]
    grouped = f', groups of {group_size}' if group_size else ''
    yield Scheduled(
        f'{m} rows, {bits} bits{grouped}',
        functools.partial(tpu.packed_matmul, bits=bits, group_size=group_size), structs,
        d * tpu.WIDE, tuple(loops),
    )
