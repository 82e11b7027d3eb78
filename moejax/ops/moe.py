"""The expert block on a batch of tokens, on one device or sharded over a mesh."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from moejax import sharding, tree
from moejax.errors import UserError
from moejax.ops import dropout, ffn
from moejax.routing import dispatch
from moejax.routing.types import Routing


def num_experts(experts: Mapping[str, Any]) -> int:
  return experts['wi'].shape[0]


def moe_ffn(
    experts: Mapping[str, Any],
    x_btd: jax.Array,
    routing: Routing,
    activation: str,
    *,
    mesh: Mesh | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
  """Sum over choices of gate * expert(x), [b, t, d]; a dropped token gives 0.

  With a key and a rate above 0 the experts' hidden units are dropped before wo. What is kept is a
  function of the key, of the token's place in the batch, of the choice and of the unit: the same
  on every mesh.

  With a mesh of several devices the batch is split over data and expert, the experts over expert
  and their hidden units over tensor; each expert group gathers its tokens and returns the sums,
  so nothing is dropped. Codes cannot be cut by hidden unit: in a layer with a weight node the
  devices along tensor hold the same experts and do the same work.

  Raises:
    UserError: the batch or the experts do not divide over the devices.
  """
  batch, length, d = x_btd.shape
  k = routing.choice_mk.shape[-1]
  seed: Any = None
  if dropout_key is not None and dropout_rate > 0:
    seed = jax.random.bits(dropout_key, (2,), jnp.uint32)
  if mesh is None or mesh.size == 1:
    drop = lambda h, pair: dropout.drop_rows(h, seed, pair, dropout_rate)
    y_mkd = _apply(
        experts, x_btd.reshape(-1, d), routing.choice_mk, routing.keep_mk, activation,
        None if seed is None else drop,
    )
  else:
    y_mkd = _sharded(experts, x_btd, routing, activation, mesh, dropout_rate, seed)
  gate = routing.gate_mk.astype(y_mkd.dtype)[..., None]
  return (y_mkd * gate).sum(1).reshape(batch, length, d) if k > 1 else (
      (y_mkd * gate).reshape(batch, length, d)
  )


def _apply(
    experts: Mapping[str, Any],
    x_md: jax.Array,
    choice_mk: jax.Array,
    keep_mk: jax.Array,
    activation: str,
    drop: Callable[[jax.Array, jax.Array], jax.Array] | None,
) -> jax.Array:
  """Each pair's output [m, k, d] from the experts at hand; drop(hidden, pair) or None."""

  def fn(rows, sizes, pair):
    hidden_fn = None if drop is None else lambda h: drop(h, pair)
    return ffn.expert_ffn(experts, rows, sizes, activation, hidden_fn)

  return dispatch.apply_experts(x_md, choice_mk, keep_mk, num_experts(experts), fn)


def _sharded(
    experts: Mapping[str, Any],
    x_btd: jax.Array,
    routing: Routing,
    activation: str,
    mesh: Mesh,
    rate: float,
    seed: Any,
) -> jax.Array:
  batch, length, d = x_btd.shape
  k = routing.choice_mk.shape[-1]
  ways, shards = sharding.batch_ways(mesh), mesh.shape['expert']
  if batch % ways:
    raise UserError(f'batch {batch} does not divide over data x expert = {ways} devices')
  if num_experts(experts) % shards:
    raise UserError(
        f'{num_experts(experts)} experts do not divide over mesh axis expert = {shards}'
    )
  nodes = not all(tree.is_array(w) for w in experts.values())

  def local(experts, x, choice, keep, seed):
    gather = lambda a: jax.lax.all_gather(a, 'expert', axis=0, tiled=True)
    x, choice, keep = gather(x), gather(choice), gather(keep)
    own = num_experts(experts)
    choice = choice - own * jax.lax.axis_index('expert')
    here = keep & (choice >= 0) & (choice < own)

    def drop(h, pair):
      # The gathered tokens are the data axis's own share of the batch, in order.
      pair = pair + choice.size * jax.lax.axis_index('data')
      column = 0 if nodes else h.shape[1] * jax.lax.axis_index('tensor')
      return dropout.drop_rows(h, seed, pair, rate, column)

    y = _apply(
        experts, x, jnp.where(here, choice, 0), here, activation, None if seed is None else drop
    )
    if not nodes:
      y = jax.lax.psum(y, 'tensor')
    return jax.lax.psum_scatter(y, 'expert', scatter_dimension=0, tiled=True)

  specs = {
      name: _weight_specs(name, w, mesh, None if nodes else 'tensor') for name, w in experts.items()
  }
  rows = PartitionSpec(sharding.BATCH_AXES)
  return jax.shard_map(
      local, mesh=mesh, in_specs=(specs, rows, rows, rows, PartitionSpec()), out_specs=rows,
      check_vma=False,
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
  axes = (hidden, None) if name == 'wo' else (None, hidden)
  return PartitionSpec('expert', *axes)
