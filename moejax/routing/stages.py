"""Experts chosen one after the other, each drawn among those still free and near the best."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.errors import UserError
from moejax.routing import draws as draws_lib


class Stage(NamedTuple):
  """One choice of each token; nothing here has a gradient.

  choice_m: int32, the expert. best_m: int32, the free expert with the largest logit. keep_me:
  bool, the candidates. probs_me: softmax among them, 0 for the others.
  """

  choice_m: jax.Array
  best_m: jax.Array
  keep_me: jax.Array
  probs_me: jax.Array


def candidates(
    logits_me: jax.Array, free_me: jax.Array, eps: float | None, variant: str = 'reference'
) -> jax.Array:
  """The free experts whose logit z is near the largest of them, z*, bool [m, e].

  'reference', the released code: z* - z <= 2 eps max(|z|, z*). 'paper' (GRIN, arXiv 2409.12136,
  eq. 2): z* - z <= eps (|z| + |z*|). Both widen with a common offset of the logits. The largest
  itself always stays. eps None keeps every free expert.
  """
  if eps is None:
    return free_me
  best_m1 = jnp.max(jnp.where(free_me, logits_me, -jnp.inf), axis=-1, keepdims=True)
  if variant == 'paper':
    band_me = eps * (jnp.abs(logits_me) + jnp.abs(best_m1))
  else:
    band_me = 2 * eps * jnp.maximum(jnp.abs(logits_me), best_m1)
  # The code divides by the maximum, which is NaN for 0 / 0 and then keeps; so does 0 <= 0.
  return free_me & (best_m1 - logits_me <= band_me)


def choose(
    logits_me: jax.Array,
    k: int,
    *,
    eps: float | None = None,
    variant: str = 'reference',
    temperature: float = 1.0,
    draws: draws_lib.Draws | None = None,
) -> list[Stage]:
  """k stages: candidates among the free experts, a softmax over them, a draw, which is then taken.

  Without draws the best free expert is taken, which gives the plain top k in order.

  Args:
    logits_me: float router logits.
    k: choices a token.
    eps: width of the candidate band, see `candidates`; None keeps all free experts.
    temperature: probabilities are softmax(logits / temperature).
    draws: random numbers of the k choices.

  Raises:
    UserError: k is not between 1 and the number of experts.
  """
  num_experts = logits_me.shape[-1]
  if not 1 <= k <= num_experts:
    raise UserError(f'{k} choices among {num_experts} experts')
  logits_me = jax.lax.stop_gradient(logits_me)
  free_me = jnp.ones(logits_me.shape, bool)
  done = []
  for i in range(k):
    keep_me = candidates(logits_me, free_me, eps, variant)
    best_m = jnp.argmax(jnp.where(free_me, logits_me, -jnp.inf), axis=-1).astype(jnp.int32)
    cooled_me = logits_me / temperature
    probs_me = jax.nn.softmax(jnp.where(keep_me, cooled_me, -jnp.inf), axis=-1)
    choice_m = best_m if draws is None else draws_lib.gumbel_argmax(
        cooled_me, keep_me, draws.exponential[i]
    )
    done.append(Stage(choice_m, best_m, keep_me, probs_me))
    free_me = free_me & (jnp.arange(num_experts)[None] != choice_m[:, None])
  return done


def candidate_counts(stages: list[Stage]) -> jax.Array:
  """How many candidates each choice had, int32 [m, k]."""
  return jnp.stack([s.keep_me.sum(-1, dtype=jnp.int32) for s in stages], axis=-1)


def choices(stages: list[Stage]) -> jax.Array:
  """The experts of each token, int32 [m, k]."""
  return jnp.stack([s.choice_m for s in stages], axis=-1)
