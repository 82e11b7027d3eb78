"""Linen shell of the sparse feed-forward block; its parts can be called one by one."""

import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moejax import sharding
from moejax.config import ModelConfig
from moejax.nn.layers import ffn_params, norm_after, norm_before, norm_params, normal, weight
from moejax.nn.selection import SelectionRouter
from moejax.ops import ffn, moe, selected
from moejax.routing import members, remap, router
from moejax.routing.draws import Draws
from moejax.routing.types import Routing


class Router(nn.Module):
  """Declares the router's float32 kernel and routes."""

  config: ModelConfig
  mesh: Mesh | None = None
  train: bool = False

  @nn.compact
  def __call__(
      self, x_btd: jax.Array, valid_bt: jax.Array | None = None,
      tokens_bt: jax.Array | None = None, draws: Draws | None = None,
      expert_map_e: jax.Array | None = None,
  ) -> Routing:
    """Routes among num_experts, or among the groups of an expert map."""
    c = self.config
    m: Any = c.moe
    params = {'kernel': weight(self, 'kernel', normal(c.init_std(c.d_model)),
                               (c.d_model, m.num_experts))}
    if m.router_bias:
      params['bias'] = weight(self, 'bias', nn.initializers.zeros, (m.num_experts,))
    if self.train and m.router_jitter_noise > 0:
      x_btd = router.jitter(x_btd, m.router_jitter_noise, self.make_rng('router'))
    logits_bte = router.router_logits(params, x_btd)
    if expert_map_e is not None:
      logits_bte = remap.group_logits(logits_bte, expert_map_e, m.held)
      m = dataclasses.replace(
          m, num_experts=m.held, layer_experts=(), merged=False, sum_groups=False
      )
    if m.members > 1:
      logits_bte = members.own_experts(logits_bte, m.members)
    return router.route(
        m, logits_bte, key=self.make_rng('router') if self.train else None,
        valid_bt=valid_bt if m.router_ignore_padding_tokens else None, tokens_bt=tokens_bt,
        groups=m.balance_groups or sharding.batch_ways(self.mesh), draws=draws,
    )


class Experts(nn.Module):
  """Declares the stacked experts and applies them to routed tokens; says what was computed."""

  config: ModelConfig
  mesh: Mesh | None = None
  train: bool = False

  def setup(self):
    c = self.config
    m: Any = c.moe
    self.weights = ffn_params(self, c, (m.held,), m.width(c.d_ff), expert_biases(c))

  def mass(self, x_btd: jax.Array) -> jax.Array:
    """How much of each expert a token activates, float32 [b, t, e]: all experts are run."""
    return selected.activation_mass(self.weights, x_btd, self.config.act)

  def __call__(self, x_btd: jax.Array, routing: Routing) -> tuple[jax.Array, Routing]:
    c = self.config
    m: Any = c.moe
    params = self.weights
    rate = max(c.dropout_rate, m.expert_dropout_rate) if self.train else 0.0
    alone = self.mesh is None or self.mesh.size == 1
    if m.selection is not None and alone and not rate:
      return selected.selected_ffn(params, x_btd, routing, c.act), routing
    y, keep_mk = moe.moe_ffn(
        params, x_btd, routing, c.act, mesh=self.mesh, dropout_rate=rate,
        dropout_key=self.make_rng('dropout') if rate > 0 else None,
        exchange_factor=m.exchange_factor,
    )
    return y, routing if keep_mk is routing.keep_mk else routing.kept(keep_mk)


def expert_biases(c: ModelConfig) -> tuple[str, ...]:
  """Which weights of an expert have a bias: those of the dense FFN it was a part of.

  The output's is the layer's, not an expert's; where experts that are not chosen give a constant,
  one that is takes its own off.
  """
  m: Any = c.moe
  if m.selection is None:
    return ()
  inner = (('wi', 'gate') if c.gated else ('wi',)) if getattr(c, 'ffn_bias', False) else ()
  return (*inner, 'wo') if m.selection.fill and m.held > 1 else inner


def layer_bias(c: ModelConfig) -> bool:
  """Whether a sparse layer has a bias of its output."""
  m: Any = c.moe
  return m.selection is not None and (
      getattr(c, 'ffn_bias', False) or (m.selection.fill and m.held > 1)
  )


class SharedExpert(nn.Module):
  """The FFN that every token meets beside its choices, perhaps scaled by a sigmoid of the token."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_btd: jax.Array) -> jax.Array:
    c = self.config
    m: Any = c.moe
    biases = tuple(name for name in expert_biases(c) if name != 'wo')
    y = ffn.dense_ffn(ffn_params(self, c, (), m.shared_d_ff, biases), x_btd, c.act)
    if m.shared_gate:
      scale = weight(self, 'scale', normal(c.init_std(c.d_model)), (c.d_model, 1))
      y = y * jax.nn.sigmoid(ffn.linear(x_btd, scale))
    return y


class MoeFfn(nn.Module):
  """x + dropout(sum of gate * expert(norm(x))); returns the routing too.

  config: of this layer (`of_layer`). The routing is that of the router's own choices, also where
  merged experts stand behind them.
  """

  config: ModelConfig
  mesh: Mesh | None = None
  train: bool = False

  def setup(self):
    c = self.config
    self.norm, self.norm_bias = norm_params(self, c)
    selects = c.moe.selection is not None
    self.router: Any = SelectionRouter(c) if selects else Router(c, self.mesh, self.train)
    if layer_bias(c):
      self.wo_bias = weight(self, 'wo_bias', nn.initializers.zeros, (c.d_model,))
    self.experts = Experts(c, self.mesh, self.train)
    if getattr(c.moe, 'shared_d_ff', 0):
      self.shared = SharedExpert(c)
    if c.moe.merged:
      even = lambda key, shape, dtype: jnp.arange(shape[0], dtype=dtype) % c.moe.held
      self.expert_map = weight(self, 'expert_map', even, (c.moe.num_experts,), jnp.int32)
    if c.moe.router == 'sparsemixer_v1':
      self.omega = weight(self, 'omega', nn.initializers.ones, (c.d_model,))
    self.dropout = nn.Dropout(c.dropout_rate, deterministic=not self.train)

  def route(
      self, x_btd: jax.Array, valid_bt: jax.Array | None = None,
      tokens_bt: jax.Array | None = None, draws: Draws | None = None,
  ) -> tuple[jax.Array, Routing]:
    """The normed input of the experts and where each token goes."""
    c = self.config
    normed = norm_before(c, x_btd, self.norm, self.norm_bias)
    if self.train and c.moe.input_jitter_noise > 0:
      noised = router.jitter(normed, c.moe.input_jitter_noise, self.make_rng('router'))
      normed = noised.astype(normed.dtype)
    if c.moe.selection is not None:
      mass = self.experts.mass(normed) if c.moe.selection.score == 'oracle' else None
      return normed, self.router(normed, valid_bt, mass)
    groups = self.expert_map if c.moe.sum_groups else None
    return normed, self.router(normed, valid_bt, tokens_bt, draws, groups)

  def lead(self, routing: Routing) -> Routing:
    """The routing to the experts that the layer holds."""
    m = self.config.moe
    routing = remap.skip(routing, m.skip[0]) if m.skip else routing
    return remap.remap(routing, self.expert_map) if m.merged and not m.sum_groups else routing

  def beside(self, normed_btd: jax.Array) -> Any:
    """What the shared expert and the layer's bias add, or 0."""
    y: Any = self.shared(normed_btd) if getattr(self.config.moe, 'shared_d_ff', 0) else 0
    if not layer_bias(self.config):
      return y
    bias = self.wo_bias.astype(normed_btd.dtype)[None, None]
    return y + jnp.broadcast_to(bias, normed_btd.shape)

  def __call__(
      self, x_btd: jax.Array, valid_bt: jax.Array | None = None,
      tokens_bt: jax.Array | None = None, draws: Draws | None = None,
  ) -> tuple[jax.Array, Routing]:
    c = self.config
    normed, routing = self.route(x_btd, valid_bt, tokens_bt, draws)
    y, computed = self.experts(normed, self.lead(routing))
    routing = routing if c.moe.merged and not c.moe.sum_groups else computed
    if c.moe.router == 'sparsemixer_v1':
      y = y * self.omega.astype(y.dtype)[None, None]
    x_btd = x_btd + self.dropout(y + self.beside(normed))
    return norm_after(c, x_btd, self.norm, self.norm_bias), routing
