"""Linen shell of the sparse feed-forward block; its parts can be called one by one."""

from typing import Any

from flax import linen as nn
import jax
from jax.sharding import Mesh

from moejax.config import ModelConfig
from moejax.nn.layers import ffn_params, normal, weight
from moejax.ops import moe, norm
from moejax.routing import switch
from moejax.routing.types import Routing


class Router(nn.Module):
  """Declares the router's float32 kernel and routes."""

  config: ModelConfig
  train: bool = False

  @nn.compact
  def __call__(self, x_btd: jax.Array, valid_bt: jax.Array | None = None) -> Routing:
    c, m = self.config, self.config.moe
    init = normal(c.initializer_factor * c.d_model**-0.5)
    params = {'kernel': weight(self, 'kernel', init, (c.d_model, m.num_experts))}
    if m.router_bias:
      params['bias'] = weight(self, 'bias', nn.initializers.zeros, (m.num_experts,))
    if self.train and m.router_jitter_noise > 0:
      x_btd = switch.jitter(x_btd, m.router_jitter_noise, self.make_rng('router'))
    logits_bte = switch.router_logits(params, x_btd)
    valid = valid_bt if m.router_ignore_padding_tokens else None
    return switch.route(logits_bte, capacity=m.expert_capacity, valid_bt=valid)


class Experts(nn.Module):
  """Declares the stacked experts and applies them to routed tokens."""

  config: ModelConfig
  mesh: Mesh | None = None
  train: bool = False

  @nn.compact
  def __call__(self, x_btd: jax.Array, routing: Routing) -> jax.Array:
    params: dict[str, Any] = ffn_params(self, self.config, (self.config.moe.num_experts,))
    rate = self.config.dropout_rate if self.train else 0.0
    return moe.moe_ffn(
        params, x_btd, routing, self.config.activation, mesh=self.mesh, dropout_rate=rate,
        dropout_key=self.make_rng('dropout') if rate > 0 else None,
    )


class MoeFfn(nn.Module):
  """x + dropout(sum of gate * expert(norm(x))); returns the routing too."""

  config: ModelConfig
  mesh: Mesh | None = None
  train: bool = False

  def setup(self):
    self.norm = weight(self, 'norm', nn.initializers.ones, (self.config.d_model,))
    self.router = Router(self.config, self.train)
    self.experts = Experts(self.config, self.mesh, self.train)
    self.dropout = nn.Dropout(self.config.dropout_rate, deterministic=not self.train)

  def route(
      self, x_btd: jax.Array, valid_bt: jax.Array | None = None
  ) -> tuple[jax.Array, Routing]:
    """The normed input of the experts and where each token goes."""
    normed = norm.rms_norm(x_btd, self.norm, self.config.norm_eps)
    return normed, self.router(normed, valid_bt)

  def __call__(
      self, x_btd: jax.Array, valid_bt: jax.Array | None = None
  ) -> tuple[jax.Array, Routing]:
    normed, routing = self.route(x_btd, valid_bt)
    return x_btd + self.dropout(self.experts(normed, routing)), routing
