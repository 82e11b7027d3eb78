"""A router's logits, and the routers by name."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moejax.config import MoeConfig
from moejax.routing import switch, topk
from moejax.routing.types import Routing


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


def route(
    config: MoeConfig,
    logits_bte: jax.Array,
    *,
    key: jax.Array | None = None,
    valid_bt: jax.Array | None = None,
    tokens_bt: jax.Array | None = None,
    groups: int = 1,
) -> Routing:
  """Routes with the router that the config names.

  Args:
    config: router, choices, capacity, losses.
    logits_bte: float32 router logits.
    key: for routers that sample; None is evaluation, deterministic.
    valid_bt: bool; False tokens (padding) go to no expert and count in no loss.
    tokens_bt: token ids, for router 'hash'.
    groups: equal parts of the batch that a 'local' balance loss looks at one by one.
  """
  del key, tokens_bt, groups
  capacity = config.expert_capacity
  if config.router == 'switch':
    return switch.route(logits_bte, capacity=capacity, valid_bt=valid_bt)
  return topk.route(logits_bte, config.top_k, normalize=config.normalize_gates, valid_bt=valid_bt)
