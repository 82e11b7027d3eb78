"""Dropout by row number: a row keeps its mask wherever it lies, in whatever order and shard.

Threefry, which `jax.random` uses, took 30 to 60 times as long on CPU as the hash below.
"""

import jax
import jax.numpy as jnp
import numpy as np


def drop_rows(
    x_mf: jax.Array,
    seed: jax.Array,
    row_m: jax.Array,
    rate: float,
    first_column: jax.Array | int = 0,
) -> jax.Array:
  """Zeroes entries with probability `rate` and scales the others by 1 / (1 - rate).

  Args:
    x_mf: rows in any order; perhaps some columns of them only.
    seed: uint32 [2].
    row_m: the number of each row: with `seed` and the column it alone decides what is kept.
    rate: in [0, 1).
    first_column: the number of the first column of x.
  """
  column_f = jnp.asarray(first_column, jnp.uint32) + jnp.arange(x_mf.shape[1], dtype=jnp.uint32)
  keep = _bits(seed, row_m.astype(jnp.uint32), column_f) >= np.uint32(round(rate * 2**32))
  return jnp.where(keep, x_mf / (1.0 - rate), jnp.zeros((), x_mf.dtype))


def _bits(seed: jax.Array, row_m: jax.Array, column_f: jax.Array) -> jax.Array:
  """Uniform uint32 [m, f], a function of seed, row and column."""
  first_m = _mix(_mix(row_m ^ seed[0]) + seed[1])
  second_m = _mix(first_m + np.uint32(0x9E3779B9))
  return _mix(_mix(first_m[:, None] + column_f[None, :]) ^ second_m[:, None])


def _mix(x: jax.Array) -> jax.Array:
  """The finalizer of MurmurHash3: a bijection of uint32 whose input bits move all output bits."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
