"""Capacity: how many tokens of one sequence an expert takes, and which of them."""

import math

import jax
import jax.numpy as jnp


def tokens(factor: float, length: int, choices: int, num_experts: int) -> int:
  """`factor` times an expert's even share of a sequence, rounded up, at least 1."""
  share = factor * length * choices / num_experts
  return max(1, math.ceil(round(share, 6)))


def mask(
    choice_btk: jax.Array, counted_btk: jax.Array, num_experts: int, capacity: int
) -> jax.Array:
  """True where a choice is among the first `capacity` of its sequence for its expert.

  All first choices are served before any second one (GShard, arXiv 2006.16668, Alg. 1), and each
  of them in order of position, as Hugging Face's Switch does. What is not counted takes no place.

  Args:
    choice_btk: int, experts.
    counted_btk: bool, False for padding and for what is no choice.

  Returns:
    bool [b, t, k].
  """
  batch, length, k = choice_btk.shape
  # (b t k) -> (b k*t): first choices of the whole sequence, then second ones.
  in_order = lambda a: a.swapaxes(1, 2).reshape(batch, k * length)
  choice, counted = in_order(choice_btk), in_order(counted_btk)
  onehot = jax.nn.one_hot(choice, num_experts, dtype=jnp.int32) * counted[..., None].astype(
      jnp.int32
  )
  place = jnp.take_along_axis(jnp.cumsum(onehot, axis=1), choice[..., None], axis=-1)[..., 0]
  return (place <= capacity).reshape(batch, k, length).swapaxes(1, 2)
