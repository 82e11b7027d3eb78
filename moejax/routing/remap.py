"""Choices of merged experts: several of the router's choices lead to one expert (MC-SMoE, 3.1)."""

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
