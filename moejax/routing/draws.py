"""The random numbers of a router: drawn from a key, or recorded and given back."""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp

from moejax.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
  """One entry a choice, as k arrays or as one array with a leading axis k.

  exponential: k of [m, e], Exponential(1); -log of it is Gumbel noise. uniform: k of [m], in
  [0, 1).
  """

  exponential: Sequence[jax.Array] | jax.Array
  uniform: Sequence[jax.Array] | jax.Array


def from_key(key: jax.Array, k: int, m: int, num_experts: int, dtype=jnp.float32) -> Draws:
  """New draws for k choices of m tokens."""
  noise, coin = jax.random.split(key)
  return Draws(
      exponential=jax.random.exponential(noise, (k, m, num_experts), dtype),
      uniform=jax.random.uniform(coin, (k, m), dtype),
  )


def resolve(
    key: jax.Array | None, draws: Draws | None, k: int, logits_me: jax.Array
) -> Draws | None:
  """The recorded draws if given, else new ones from the key, else None: evaluation.

  Raises:
    UserError: recorded draws of another shape.
  """
  m, num_experts = logits_me.shape
  if draws is None:
    return None if key is None else from_key(key, k, m, num_experts, logits_me.dtype)
  for name, arrays, shape in (
      ('exponential', draws.exponential, (m, num_experts)), ('uniform', draws.uniform, (m,))
  ):
    if len(arrays) != k or any(a.shape != shape for a in arrays):
      found = [tuple(a.shape) for a in arrays]
      raise UserError(f'draws.{name} has shapes {found}, the router needs {k} of {shape}')
  return draws


def gumbel_argmax(logits_me: jax.Array, among_me: jax.Array, exponential_me: jax.Array):
  """A draw from softmax(logits) over the experts of `among_me`, int32 [m] (Gumbel-max).

  Noise is added before masking, so that a draw of exactly 0 (infinite noise) makes no NaN.
  """
  noisy = logits_me - jnp.log(exponential_me)
  return jnp.argmax(jnp.where(among_me, noisy, -jnp.inf), axis=-1).astype(jnp.int32)
