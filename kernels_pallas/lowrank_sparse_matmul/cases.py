"""Shapes that every implementation is checked on, and those whose TPU schedules are counted."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.lowrank_sparse_matmul import tpu
from kernels_pallas.ternary_matmul.cases import Scheduled


class Case(NamedTuple):
  """Rows of each group, rows that belong to none, widths, rank, and kept outputs of each group."""

  name: str
  sizes: tuple[int, ...]
  outside: int
  d: int
  f: int
  r: int
  kept: tuple[int, ...]

  def outputs(self) -> np.ndarray:
    """int32 [e, s]: outputs at random, rising; s is that of the group that keeps most."""
    rng = np.random.default_rng(len(self.name))
    index = np.full((len(self.kept), max(*self.kept, 1)), self.f, np.int32)
    for own, count in zip(index, self.kept):
      own[:count] = np.sort(rng.permutation(self.f)[:count])
    return index


CHECKED: tuple[Case, ...] = (
    Case('one_weight', (1,), 0, 1, 1, 1, (1,)),
    Case('one_row', (0, 1), 0, 24, 40, 3, (7, 5)),
    Case('no_rows', (0, 0, 0), 9, 24, 40, 5, (1, 2, 3)),
    Case('empty_groups', (3, 0, 5, 1), 7, 136, 130, 16, (20, 0, 130, 1)),
    Case('all_on_one', (200, 0, 0), 0, 256, 128, 8, (0, 12, 3)),
    Case('all_on_the_last', (0, 0, 150), 5, 128, 256, 9, (1, 1, 256)),
    Case('tails', (17, 1, 33), 3, 700, 1100, 33, (300, 129, 128)),
    Case('nothing_kept', (4, 5), 0, 64, 64, 4, (0, 0)),
    Case('sixty_four', (30, 34), 0, 256, 600, 130, (64, 65)),
    Case('five_hundred', (212, 200, 100), 0, 256, 64, 16, (6, 60, 30)),
)


_EXPERTS, _D, _F, _R, _S = 8, 4096, 6144, 640, 640
_ROWS = ((16, jnp.bfloat16), (512, jnp.bfloat16), (16, jnp.float32))


def scheduled_project() -> Iterator[Scheduled]:
  """At rank 640 and as many outputs kept; figures are for as many weights of left and kept."""
  e, d, r, s = _EXPERTS, _D, _R, _S
  for m, dtype in _ROWS:
    structs = (
        jax.ShapeDtypeStruct((m, d), dtype), jax.ShapeDtypeStruct((e, d, r), dtype),
        jax.ShapeDtypeStruct((e, d, s), dtype), jax.ShapeDtypeStruct((e,), jnp.int32),
    )
    deep = tpu.depth(d, r + s, jnp.dtype(dtype).itemsize)
    name = f'{m} rows, {jnp.dtype(dtype).name}'
    yield Scheduled(name, tpu.project, structs, deep * (r + s))


def scheduled_expand() -> Iterator[Scheduled]:
  """Figures are for as many weights of right, and every chunk of kept outputs in every tile."""
  e, f, r, s = _EXPERTS, _F, _R, _S
  for m, dtype in _ROWS:
    structs = (
        jax.ShapeDtypeStruct((m, r), dtype), jax.ShapeDtypeStruct((m, s), dtype),
        jax.ShapeDtypeStruct((e, r, f), dtype), jax.ShapeDtypeStruct((e, s), jnp.int32),
        jax.ShapeDtypeStruct((e,), jnp.int32),
    )
    name = f'{m} rows, {jnp.dtype(dtype).name}'
    yield Scheduled(name, tpu.expand, structs, r * tpu.WIDE, (s // tpu.LANES,))
