"""The expert block on a batch of tokens, on one device or sharded over a mesh."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from moejax import sharding, tree
from moejax.config import Act
from moejax.errors import UserError
from moejax.ops import dropout, exchange, ffn
from moejax.routing import dispatch
from moejax.routing.types import Routing

# Drops hidden units of rows: (hidden, number of each row's pair) -> hidden.
Drop = Callable[[jax.Array, jax.Array], jax.Array]


def num_experts(experts: Mapping[str, Any]) -> int:
  return experts['wi'].shape[0]


def moe_ffn(
    experts: Mapping[str, Any],
    x_btd: jax.Array,
    routing: Routing,
    activation: Act,
    *,
    mesh: Mesh | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    exchange_factor: float | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Sum over choices of gate * expert(x), [b, t, d], and which choices were computed, bool [m, k].

  A choice that is not computed, dropped by the router or on the way, gives 0.

  With a key and a rate above 0 the experts' hidden units are dropped before wo. What is kept is a
  function of the key, of the token's place in the batch, of the choice and of the unit: the same
  on every mesh.

  With a mesh of several devices the batch is split over data and expert, the experts over expert
  and their hidden units over tensor. Between the devices of the axis expert tokens travel in one
  of two ways, see `exchange`: exchange_factor None gathers all tokens where all experts are and
  returns the sums; a number sends each token to its experts by all-to-all, in buffers of that
  many times the even share, 0 for buffers that no routing can overflow. Codes cannot be cut by
  hidden unit: in a layer with a weight node the devices along tensor hold the same experts and do
  the same work.

  Raises:
    UserError: the batch or the experts do not divide over the devices.
  """
  batch, length, d = x_btd.shape
  seed: Any = None
  if dropout_key is not None and dropout_rate > 0:
    seed = jax.random.bits(dropout_key, (2,), jnp.uint32)
  if mesh is None or mesh.size == 1:
    drop = lambda h, pair: dropout.drop_rows(h, seed, pair, dropout_rate)
    y_mkd = _apply(
        experts, x_btd.reshape(-1, d), routing.choice_mk, routing.keep_mk, activation,
        None if seed is None else drop,
    )
    keep_mk = routing.keep_mk
  else:
    y_mkd, keep_mk = _sharded(
        experts, x_btd, routing, activation, mesh, dropout_rate, seed, exchange_factor
    )
  return combine(y_mkd, routing).reshape(batch, length, d), keep_mk


def combine(y_mkd: jax.Array, routing: Routing) -> jax.Array:
  """Sum over choices of gate * output, [m, d], with the routing's scales on the forward pass."""
  weighted_mkd = y_mkd * routing.gate_mk.astype(y_mkd.dtype)[..., None]
  if routing.scale_mk is not None:
    scaled = weighted_mkd * routing.scale_mk.astype(y_mkd.dtype)[..., None]
    weighted_mkd = weighted_mkd + jax.lax.stop_gradient(scaled - weighted_mkd)
  return dispatch.sum_choices(weighted_mkd)


def _apply(
    experts: Mapping[str, Any],
    x_md: jax.Array,
    choice_mk: jax.Array,
    keep_mk: jax.Array,
    activation: Act,
    drop: Drop | None,
) -> jax.Array:
  """Each pair's output [m, k, d] from the experts at hand; drop(hidden, pair) or None."""

  def fn(rows, sizes, pair):
    hidden_fn = None if drop is None else lambda h: drop(h, pair)
    return ffn.expert_ffn(experts, rows, sizes, activation, hidden_fn)

  return dispatch.apply_experts(x_md, choice_mk, keep_mk, num_experts(experts), fn)


def _check(batch: int, experts: Mapping[str, Any], mesh: Mesh) -> None:
  ways, shards = sharding.batch_ways(mesh), mesh.shape['expert']
  if batch % ways:
    raise UserError(f'batch {batch} does not divide over data x expert = {ways} devices')
  if num_experts(experts) % shards:
    raise UserError(
        f'{num_experts(experts)} experts do not divide over mesh axis expert = {shards}'
    )


def _sharded(
    experts: Mapping[str, Any],
    x_btd: jax.Array,
    routing: Routing,
    activation: Act,
    mesh: Mesh,
    rate: float,
    seed: Any,
    factor: float | None,
) -> tuple[jax.Array, jax.Array]:
  batch, _, d = x_btd.shape
  k = routing.choice_mk.shape[-1]
  _check(batch, experts, mesh)
  nodes = not all(tree.is_array(w) for w in experts.values())
  travel = exchange.by_gathering if factor is None else exchange.by_all_to_all(factor)

  def local(experts, x, choice, keep, seed):
    # Pairs have the numbers that one device would give them: data, then expert, then place.
    ways = mesh.shape['expert']
    first = choice.size * (
        jax.lax.axis_index('data') * ways + jax.lax.axis_index('expert')
    )

    def drop(h, pair):
      column = 0 if nodes else h.shape[1] * jax.lax.axis_index('tensor')
      return dropout.drop_rows(h, seed, pair, rate, column)

    added = not nodes and mesh.shape['tensor'] > 1
    if added and 'wo_bias' in experts:
      first_of_all = jax.lax.axis_index('tensor') == 0
      experts = {**experts, 'wo_bias': jnp.where(first_of_all, experts['wo_bias'], 0)}

    def compute(x, sizes, pair):
      hidden_fn = None if seed is None else lambda h: drop(h, pair)
      y = ffn.expert_ffn(experts, x, sizes, activation, hidden_fn)
      return jax.lax.psum(y, 'tensor') if added else y

    return travel(compute, x, choice, keep, first, num_experts(experts), ways)

  specs = {
      name: _weight_specs(name, w, mesh, None if nodes else 'tensor') for name, w in experts.items()
  }
  rows = PartitionSpec(sharding.BATCH_AXES)
  return sharding.manual(
      local, mesh, in_specs=(specs, rows, rows, rows, PartitionSpec()), out_specs=(rows, rows)
  )(
      dict(experts),
      x_btd.reshape(-1, d),
      routing.choice_mk.reshape(-1, k),
      routing.keep_mk.reshape(-1, k),
      seed,
  )


def _weight_specs(name: str, w: Any, mesh: Mesh, hidden: str | None) -> Any:
  """Specs of an expert weight inside the block, its hidden units split over the axis `hidden`."""
  if not tree.is_array(w):
    return w.specs(mesh)
  if name.endswith('_bias'):
    return PartitionSpec('expert', None if name == 'wo_bias' else hidden)
  axes = (hidden, None) if name == 'wo' else (None, hidden)
  return PartitionSpec('expert', *axes)
