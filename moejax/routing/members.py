"""Experts in disjoint sets, one for each member of an ensemble (E^3, arXiv 2110.03360)."""

import jax
import jax.numpy as jnp


def own_experts(logits_bte: jax.Array, members: int) -> jax.Array:
  """Router logits with those of other members' experts at -inf.

  Row i is of member i % members, whose experts are the i-th of `members` equal runs of them: the
  router's kernel [d, e] is a router [d, e / members] for each.
  """
  batch, _, experts = logits_bte.shape
  set_e = jnp.arange(experts) * members // experts
  own_b = jnp.arange(batch) % members
  return jnp.where(set_e[None, None] == own_b[:, None, None], logits_bte, -jnp.inf)
