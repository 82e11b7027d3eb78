"""The hash router: a token id always goes to the same experts; nothing is learned.

Hash Layers, arXiv 2106.04426.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moejax.errors import UserError
from moejax.routing.assemble import assemble
from moejax.routing.types import Routing


def _mix(x: jax.Array, salt: int) -> jax.Array:
  """A bijection of uint32 that scatters its bits (Wellons' lowbias32 after an xor)."""
  x = x ^ jnp.uint32(salt)
  x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
  return x ^ (x >> jnp.uint32(16))


def experts_of(tokens: jax.Array, k: int, num_experts: int) -> jax.Array:
  """The k distinct experts of each token id, int32 [..., k]; fixed for all time.

  Ids are taken in blocks of e. Within block n the id with offset o has as choice i the expert
  (o + shift_n + i * stride_n) mod e, where shift_n and stride_n are pseudo-random in n and the
  stride has no factor in common with e. So every e consecutive ids from a multiple of e on meet
  each expert exactly once in each place, which balances a vocabulary sorted by frequency too.

  Args:
    tokens: int ids, any shape.

  Raises:
    UserError: k is not between 1 and the number of experts.
  """
  if not 1 <= k <= num_experts:
    raise UserError(f'{k} choices among {num_experts} experts')
  ids = tokens.astype(jnp.uint32)
  block, offset = ids // num_experts, ids % num_experts
  strides = [s for s in range(1, num_experts + 1) if math.gcd(s, num_experts) == 1]
  shift = _mix(block, 0x2545F491) % num_experts
  stride = jnp.array(strides, jnp.uint32)[_mix(block, 0x9E3779B9) % len(strides)]
  places = [offset + shift + i * stride for i in range(k)]
  return (jnp.stack(places, axis=-1) % num_experts).astype(jnp.int32)


def route(
    tokens_bt: jax.Array,
    logits_bte: jax.Array,
    k: int = 1,
    *,
    normalize: bool = False,
    capacity: int | None = None,
    valid_bt: jax.Array | None = None,
    groups: int = 1,
) -> Routing:
  """Sends each token where its id says, with gate 1; both losses are 0.

  Args:
    tokens_bt: int token ids.
    logits_bte: float32 logits, which decide nothing here but their shape and dtype.
    k: choices a token.
    normalize: gates are 1 / k, so that they sum to 1.
    capacity, valid_bt, groups: see `assemble`.

  Raises:
    UserError: k is not between 1 and the number of experts.
  """
  choice_mk = experts_of(tokens_bt, k, logits_bte.shape[-1]).reshape(-1, k)
  gate_mk = jnp.full(choice_mk.shape, 1 / k if normalize else 1.0, logits_bte.dtype)
  routing = assemble(
      logits_bte, choice_mk, gate_mk, candidates_mk=jnp.ones_like(choice_mk), capacity=capacity,
      valid_bt=valid_bt, groups=groups,
  )
  zero = jnp.zeros((), logits_bte.dtype)
  return dataclasses.replace(routing, load_balance_loss=zero, z_loss=zero)
