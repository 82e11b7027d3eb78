"""What stands between a router's choices and the experts of a compressed layer.

Of merged experts, several choices lead to one (MC-SMoE, arXiv 2310.01334, 3.1), or the router
chooses among the groups; and a second choice may be skipped (NAEE, 2402.14800).
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.routing.types import Routing


def remap(routing: Routing, expert_map_e: jax.typing.ArrayLike) -> Routing:
  """The routing with each choice led to its expert; no token meets an expert twice.

  Where several kept choices of a token lead to one expert, the first of them keeps it and gets all
  their gates, the others are dropped: the same output for the work of one. load_e, logits_me and
  the losses stay those of the router's own choices.

  Args:
    expert_map_e: int32 [e], the expert that each choice of the router leads to.
  """
  choice = jnp.asarray(expert_map_e, jnp.int32)[routing.choice_mk]
  if routing.choice_mk.shape[1] == 1:
    return dataclasses.replace(routing, choice_mk=choice)
  keep = routing.keep_mk
  same_mkk = (choice[:, :, None] == choice[:, None, :]) & keep[:, :, None] & keep[:, None, :]
  before_kk = jnp.tril(jnp.ones((choice.shape[1],) * 2, bool), -1)
  first = keep & ~(same_mkk & before_kk[None]).any(2)

  def together(value_mk):
    total = jnp.einsum('mij,mj->mi', same_mkk.astype(value_mk.dtype), value_mk)
    return jnp.where(first, total, 0)

  gate, scale = together(routing.gate_mk), routing.scale_mk
  if scale is not None:
    scale = together(routing.gate_mk * scale) / jnp.where(gate == 0, 1, gate)
    scale = jnp.where(first, scale, 1)
  return dataclasses.replace(
      routing, choice_mk=choice, keep_mk=first, gate_mk=gate, scale_mk=scale
  )


def group_logits(
    logits_bte: jax.Array, expert_map_e: jax.typing.ArrayLike, groups: int
) -> jax.Array:
  """Logits whose softmax is each group's summed probability, [b, t, g]: logsumexp over members."""
  member_ge = jnp.arange(groups)[:, None] == jnp.asarray(expert_map_e)[None]
  return jnp.stack(
      [jax.nn.logsumexp(logits_bte, axis=-1, where=own[None, None]) for own in member_ge], -1
  )


def skip(routing: Routing, share: float) -> Routing:
  """Drops a token's second choice whose gate is below `share` of the first's (NAEE, 3.3).

  The first takes over its gate, so that their sum stays. load_e stays that of the router's choices.
  """
  first, second = routing.gate_mk[:, 0], routing.gate_mk[:, 1]
  skipped = (second < share * first) & routing.keep_mk[:, 0]
  gate_mk = jnp.stack([jnp.where(skipped, first + second, first), jnp.where(skipped, 0, second)], 1)
  keep_mk = routing.keep_mk.at[:, 1].set(routing.keep_mk[:, 1] & ~skipped)
  return dataclasses.replace(routing, gate_mk=gate_mk, keep_mk=keep_mk)
