"""A loss that makes FFN activations sparse: L1 or square-Hoyer, its weight raised in stages."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moejax.config import ActivityConfig
from moejax.ops.activity import Activity


def weight(config: ActivityConfig, step: jax.Array | int) -> jax.Array:
  """The weight of the loss at a step, float32 (ProSparse, arXiv 2402.13516).

  Stage i ends `stages[i]` steps after the one before. The first has weights[0]; in each later one
  the weight goes from that of the stage before to its own along half a sine, and then stays.
  """
  now = jnp.float32(config.weights[0])
  end = config.stages[0] if config.stages else 0
  for before, after, length in zip(config.weights, config.weights[1:], config.stages[1:]):
    done = jnp.clip((jnp.asarray(step, jnp.float32) - end) / length, 0.0, 1.0)
    now = now + (after - before) * 0.5 * (1 - jnp.cos(jnp.pi * done))
    end += length
  return now


def loss(config: ActivityConfig, activity: Mapping[str, Activity]) -> jax.Array:
  """The mean over FFNs of what `form` names, before its weight."""
  return jnp.mean(jnp.stack([getattr(a, config.form) for a in activity.values()]))


def active(activity: Mapping[str, Activity]) -> jax.Array:
  """The mean over FFNs of the share of units that are not 0."""
  return jnp.mean(jnp.stack([a.active for a in activity.values()]))
