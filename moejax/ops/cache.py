"""Keys and values that attention has seen, kept for the tokens to come."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
  """Keys and values of one layer, [b, s, g, h], with a slot for each token of the longest text."""

  k_bsgh: jax.Array
  v_bsgh: jax.Array


def empty(batch: int, slots: int, heads: int, width: int, dtype: Any) -> Cache:
  """A cache of zeros."""
  shape = (batch, slots, heads, width)
  return Cache(k_bsgh=jnp.zeros(shape, dtype), v_bsgh=jnp.zeros(shape, dtype))


def extend(cache: Cache, k_btgh: jax.Array, v_btgh: jax.Array, at: jax.Array | int) -> Cache:
  """The cache with keys and values written from slot `at` on."""
  write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, 1)
  return Cache(k_bsgh=write(cache.k_bsgh, k_btgh), v_bsgh=write(cache.v_bsgh, v_btgh))
