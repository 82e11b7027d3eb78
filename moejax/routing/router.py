"""A router's logits, and the routers by name."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config import MoeConfig
from moejax.errors import UserError
from moejax.routing import capacity as capacity_lib
from moejax.routing import draws as draws_lib
from moejax.routing import (
  estimators,
  gshard,
  hashed,
  losses,
  selection,
  sparsemixer,
  switch,
  threshold,
  topk,
)
from moejax.routing.types import Routing

# Routers that evaluate every expert in training.
DENSE = ('straight_through', 'reinmax', 'densemixer')


def router_logits(params: Mapping[str, jax.Array], x_btd: jax.Array) -> jax.Array:
  """Logits [b, t, e] in float32 whatever the activations' dtype (Switch, arXiv 2101.03961, 2.4)."""
  logits_bte = jnp.einsum(
      'btd,de->bte',
      x_btd.astype(jnp.float32),
      params['kernel'].astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST,
  )
  if 'bias' in params:
    logits_bte += params['bias'].astype(jnp.float32)[None, None]
  return logits_bte


def jitter(x_btd: jax.Array, amount: float, key: jax.Array) -> jax.Array:
  """Multiplies a router's input by noise uniform in [1 - amount, 1 + amount] (2.2), float32."""
  noise = jax.random.uniform(
      key, x_btd.shape, jnp.float32, minval=1.0 - amount, maxval=1.0 + amount
  )
  return x_btd.astype(jnp.float32) * noise


def expert_capacity(config: MoeConfig, length: int) -> int | None:
  """Tokens an expert takes from one sequence of a length, or None for no bound.

  The even share that `capacity_factor` multiplies is length * top_k / num_experts. Router
  'threshold' has no fixed number of choices and counts one (XMoE, arXiv 2403.18926).
  """
  if config.capacity_factor is None:
    return config.expert_capacity
  choices = 1 if config.router == 'threshold' else config.top_k
  return capacity_lib.tokens(config.capacity_factor, length, choices, config.num_experts)


def _groups(config: MoeConfig, batch: int, groups: int, train: bool) -> int:
  """Parts of the batch that are balanced one by one; a small batch of evaluation is one part."""
  if config.balance != 'local' or (not train and batch % groups):
    return 1
  return groups


def with_losses(
    config: MoeConfig, routing: Routing, shape: tuple[int, int], *,
    valid_bt: jax.Array | None = None, groups: int = 1,
) -> Routing:
  """The routing with its balance and z loss computed again, over a batch joined from parts.

  SparseMixer-v1 balances its masked probabilities, which a routing does not hold: its loss stays.

  Args:
    shape: (b, t). valid_bt, groups: as in `route`.
  """
  weight_bt = jnp.ones(shape) if valid_bt is None else valid_bt.astype(jnp.float32)
  logits_bte = routing.logits_me.reshape(*shape, -1)
  k = config.top_k if config.router in DENSE else routing.choice_mk.shape[-1]
  chosen = None
  if config.router == 'selection':
    k, chosen = 1, routing.keep_mk[:, :1].reshape(*shape, 1)
  if routing.candidates_mk is not None:
    chosen = (routing.candidates_mk[:, :k] > 0).reshape(*shape, k)
  balance = routing.load_balance_loss
  if config.router != 'sparsemixer_v1':
    balance = losses.load_balance_loss(
        jax.nn.softmax(logits_bte, axis=-1), routing.choice_mk[:, :k].reshape(*shape, k),
        weight_bt, chosen=chosen, groups=_groups(config, shape[0], groups, True),
    )
  return dataclasses.replace(
      routing, load_balance_loss=balance, z_loss=losses.z_loss(logits_bte, weight_bt)
  )


def route(
    config: MoeConfig,
    logits_bte: jax.Array,
    *,
    key: jax.Array | None = None,
    valid_bt: jax.Array | None = None,
    tokens_bt: jax.Array | None = None,
    groups: int = 1,
    draws: draws_lib.Draws | None = None,
) -> Routing:
  """Routes with the router that the config names.

  Its load-balance loss is the 'global' or the 'local' one of `losses.load_balance_loss`. With
  balance 'pooled' it is the global one of the layer: the pooled loss is of all layers together,
  see `losses.pooled_load_balance_loss`.

  Router 'threshold' chooses among all experts, or top_k at most where top_k is above 1. Jitter,
  bias and SparseMixer-v1's omega belong to the layer, not to its router.

  Args:
    config: router, choices, capacity, losses.
    logits_bte: router logits; computed in float32, or float64 if they are.
    key: for routers that sample; None is evaluation, deterministic, and the dense estimators then
      evaluate their top_k experts only.
    valid_bt: bool; False tokens (padding) go to no expert and count in no loss.
    tokens_bt: token ids, for router 'hash'.
    groups: equal contiguous parts of the batch that a 'local' balance loss looks at one by one.
    draws: recorded random numbers instead of a key.

  Raises:
    UserError: no token ids for router 'hash'; draws of another shape; in training, a batch that
      the groups do not divide.
  """
  name, k = config.router, config.top_k
  batch, length, _ = logits_bte.shape
  train = key is not None or draws is not None
  logits_bte = logits_bte.astype(jnp.promote_types(logits_bte.dtype, jnp.float32))
  limits: dict[str, Any] = dict(
      capacity=expert_capacity(config, length), valid_bt=valid_bt,
      groups=_groups(config, batch, groups, train),
  )
  random: dict[str, Any] = dict(key=key, draws=draws, **limits)
  if name == 'hash':
    if tokens_bt is None:
      raise UserError("moe.router = 'hash' needs the token ids: pass tokens_bt")
    return hashed.route(tokens_bt, logits_bte, k, normalize=config.normalize_gates, **limits)
  if config.selection is not None:
    return selection.route(config.selection, logits_bte, valid_bt)
  if name == 'topk':
    return topk.route(logits_bte, k, normalize=config.normalize_gates, **limits)
  if name == 'densemixer':
    return estimators.densemixer(
        logits_bte, k, normalize=config.normalize_gates, dense=train, **limits
    )
  if name == 'threshold':
    return threshold.route(
        logits_bte, config.threshold, limit=k if k > 1 else None,
        normalize=config.normalize_gates, **limits
    )
  if name == 'gshard':
    return gshard.route(logits_bte, **random)
  if name == 'switch':
    return switch.route(logits_bte, **limits)
  if name == 'sampled_gating':
    return estimators.sampled_gating(
        logits_bte, k, eps=config.jitter_eps, variant=config.variant, **random
    )
  if name in sparsemixer.RULES:
    return sparsemixer.route(
        logits_bte, k, version=name, eps=config.jitter_eps, variant=config.variant,
        euler_on_argmax=config.euler_on_argmax, **random
    )
  sampled = {
      'straight_through': estimators.straight_through, 'reinmax': estimators.reinmax,
      'reinforce': estimators.reinforce,
  }
  return sampled[name](logits_bte, k, **random)
