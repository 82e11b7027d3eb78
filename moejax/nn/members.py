"""A mixture of experts as an ensemble in one pass: E^3, efficient ensemble of experts.

Each input is there once for each member, which meets experts of its own (arXiv 2110.03360); members
share everything else. A trained model needs no change to be one.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config import ModelConfig
from moejax.errors import UserError


def with_members(config: ModelConfig, members: int) -> ModelConfig:
  """The config of a model whose rows take turns among `members` sets of its experts.

  Raises:
    UserError: no experts, a router without probabilities over all of them, sets that do not divide.
  """
  if config.moe is None:
    raise UserError(f'this {config.family} has no experts to be an ensemble of')
  moe: Any = dataclasses.replace(config.moe, members=members)
  return dataclasses.replace(config, moe=moe)


def tile(arrays: Mapping[str, Any], members: int) -> dict[str, Any]:
  """Every row once for each member, one after the other: [b, ...] -> [b * members, ...]."""
  return {name: jnp.repeat(jnp.asarray(a), members, axis=0) for name, a in arrays.items()}


def mean_log_probs(logits_btv: jax.Array, members: int) -> jax.Array:
  """Logarithm of the members' mean probabilities, float32: [b * members, t, v] -> [b, t, v]."""
  log_probs = jax.nn.log_softmax(logits_btv.astype(jnp.float32))
  parts = log_probs.reshape(-1, members, *log_probs.shape[1:])
  return jax.nn.logsumexp(parts, axis=1) - jnp.log(jnp.float32(members))
