"""Shapes that every implementation is checked on, and those whose TPU schedules are counted."""

from collections.abc import Iterator
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.neuron_select import tpu
from kernels_pallas.ternary_matmul.cases import Scheduled


class Case(NamedTuple):
  """m tokens over e experts d x f; share of pairs chosen at random, and what is special.

  'one' expert that all tokens chose, an 'idle' token, or each three experts chosen 'alike'.
  """

  name: str
  m: int
  e: int
  d: int
  f: int
  share: float
  special: str = ''


CHECKED: tuple[Case, ...] = (
    Case('one_token', 1, 12, 24, 16, 0.25),
    Case('few_tokens', 4, 6, 24, 8, 0.4),
    Case('nothing_chosen', 9, 4, 16, 8, 0.0),
    Case('everything_chosen', 33, 4, 16, 8, 1.0),
    Case('all_on_one', 300, 5, 24, 16, 0.0, 'one'),
    Case('an_idle_token', 70, 8, 24, 16, 0.3, 'idle'),
    Case('tails', 257, 7, 40, 24, 0.2),
    Case('one_expert', 19, 1, 16, 8, 0.5),
    Case('narrow', 64, 32, 16, 1, 0.2),
    Case('half_of_few', 9, 18, 24, 32, 0.5),
    Case('neighbours_alike', 40, 12, 40, 32, 0.4, 'alike'),
    Case('many_alike', 800, 6, 24, 40, 0.9, 'alike'),
)


def scheduled() -> Iterator[Scheduled]:
  """A gated block of 4096 inputs and 64 experts of 256 neurons, and one of experts in pieces."""
  d = 4096
  relu = lambda wi, gate: jax.nn.relu(gate) * wi
  for m, e, f, dtype in (
      (1, 64, 256, jnp.bfloat16), (16, 64, 256, jnp.bfloat16), (128, 64, 256, jnp.bfloat16),
      (16, 16, 896, jnp.bfloat16), (16, 64, 256, jnp.float32),
  ):
    like = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
    structs = (
        like(m, d), {'wi': like(e, d, f), 'gate': like(e, d, f), 'wo': like(e, f, d)},
        jax.ShapeDtypeStruct((m, e), jnp.bool_),
    )
    weights = 3 * d * tpu.width(d, f, 3, jnp.dtype(dtype).itemsize)
    name = f'{m} rows of {e} experts of {f}, {jnp.dtype(dtype).name}'
    yield Scheduled(name, functools.partial(tpu.neuron_select, act=relu), structs, weights)
