"""Stacked layers run by one program: a scan over blocks, or stages of a pipeline.

The pipeline, of decoders, is GPipe's (arXiv 1811.06965), which GRIN trains with: each device of the
mesh axis 'pipeline' holds consecutive blocks, and microbatches pass from stage to stage. With S
stages and M microbatches S - 1 of M + S - 1 ticks are idle on each stage.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from moejax import sharding
from moejax.config import ModelConfig, StackConfig
from moejax.errors import UserError
from moejax.nn import stacking
from moejax.routing import router
from moejax.routing.types import Routing

# Runs one layer: (place in the period, its params, x, context, key) -> (x, routing or None).
RunLayer = Callable[[int, Any, jax.Array, Any, jax.Array | None], tuple[jax.Array, Any]]
AXIS = 'pipeline'


def scan(
    step: int, blocks: Mapping[str, Any], x_btd: jax.Array, context: Any,
    key: jax.Array | None, run: RunLayer, *, first: jax.Array | int = 0, remat: bool = False,
    keep_states: bool = False,
) -> tuple[jax.Array, dict[int, Routing], jax.Array | None]:
  """Runs blocks one after the other; routings are stacked, by place in the period.

  With keep_states also what every layer gives, [layers, b, t, d].

  Args:
    step: layers of a block. blocks: stacked params of n blocks. first: number of the first layer.
    key: of a training step; layer i draws from fold_in(key, i).
  """

  def body(x, inputs):
    params, n = inputs
    routings, states = {}, []
    for j in range(step):
      own = None if key is None else jax.random.fold_in(key, first + n * step + j)
      x, routing = run(j, params[f'layer_{j}'], x, context, own)
      if routing is not None:
        routings[j] = routing
      states.append(x)
    return x, (routings, jnp.stack(states) if keep_states else None)

  count = jax.tree.leaves(blocks)[0].shape[0]
  body = jax.checkpoint(body) if remat else body
  x, (routings, states) = jax.lax.scan(body, x_btd, (dict(blocks), jnp.arange(count)))
  return x, routings, None if states is None else states.reshape(-1, *x.shape)


def layer_keys(key: jax.Array | None) -> dict[str, jax.Array] | None:
  """The named random streams of one layer."""
  if key is None:
    return None
  return {'dropout': jax.random.fold_in(key, 0), 'router': jax.random.fold_in(key, 1)}


def by_path(
    config: ModelConfig, routings: Mapping[int, Routing], stack: str = 'decoder'
) -> dict[str, Routing]:
  """Stacked routings as one for each layer's path, in order."""
  step = stacking.period(config, stack)
  return {
      f'{stack}/layers_{i}/ffn': jax.tree.map(lambda a, n=i // step: a[n], routings[i % step])
      for i in range(config.layers_of(stack)) if i % step in routings
  }


def check_pipeline(config: StackConfig, stages: int, batch: int, microbatches: int) -> None:
  """Raises UserError unless blocks divide over stages and the batch over microbatches."""
  blocks = config.num_layers // stacking.period(config)
  if blocks % stages:
    raise UserError(
        f'{config.num_layers} layers in {blocks} blocks of {stacking.period(config)} do not divide '
        f'over mesh axis pipeline = {stages}'
    )
  if batch % microbatches:
    raise UserError(f'batch {batch} does not divide into {microbatches} pipeline microbatches')


def pipeline(
    config: StackConfig, blocks: Mapping[str, Any], x_btd: jax.Array, context: Any,
    key: jax.Array | None, run: RunLayer, *, mesh: Mesh, microbatches: int, remat: bool = False,
) -> tuple[jax.Array, dict[int, Routing]]:
  """`scan` with the blocks over the mesh axis 'pipeline'; the same result.

  Balance losses are computed again over all microbatches together. Random draws of a microbatch
  are its own.

  Args:
    context: a pytree of arrays with the batch as leading axis.
    microbatches: parts of the batch that are under way at once; every microbatches-th row is one.

  Raises:
    UserError: blocks or batch do not divide.
  """
  stages, batch = mesh.shape[AXIS], x_btd.shape[0]
  check_pipeline(config, stages, batch, microbatches)
  ticks = microbatches + stages - 1
  step, layers = stacking.period(config), config.num_layers // stages

  def split(a):
    rows = a.reshape(batch // microbatches, microbatches, *a.shape[1:]).swapaxes(0, 1)
    return sharding.constrain(rows, mesh, None, sharding.BATCH_AXES)

  def stage(blocks, xs, contexts, key):
    own = jax.lax.axis_index(AXIS)

    def tick(state, t):
      part = jnp.clip(t - own, 0, microbatches - 1)
      pick = lambda a: jax.lax.dynamic_index_in_dim(a, part, 0, keepdims=False)
      x = jnp.where(own == 0, pick(xs), state)
      mine = None if key is None else jax.random.fold_in(key, config.num_layers + part)
      x, routings, _ = scan(
          step, blocks, x, jax.tree.map(pick, contexts), mine, run, first=own * layers,
          remat=remat,
      )
      ring = [(i, (i + 1) % stages) for i in range(stages)]
      return jax.lax.ppermute(x, AXIS, ring), (x, routings)

    _, (ys, routings) = jax.lax.scan(tick, jnp.zeros_like(xs[0]), jnp.arange(ticks))
    # A stage's microbatches come in the ticks from its own number on.
    mine = lambda a: jax.lax.dynamic_slice_in_dim(a, own, microbatches, 0)
    last = jnp.where(own == stages - 1, mine(ys), 0)
    return jax.lax.psum(last, AXIS), jax.tree.map(lambda a: mine(a).swapaxes(0, 1), routings)

  whole, layered = PartitionSpec(), PartitionSpec(AXIS)
  ys, routings = sharding.manual(
      stage, mesh, in_specs=(layered, whole, whole, whole), out_specs=(whole, layered),
      axes=(AXIS,),
  )(dict(blocks), split(x_btd), jax.tree.map(split, context), key)
  y_btd = sharding.constrain_batch(ys.swapaxes(0, 1).reshape(x_btd.shape), mesh)
  join = lambda r: _join(config, r, batch, x_btd.shape[1], getattr(context, 'valid_bt', None), mesh)
  return y_btd, {j: jax.vmap(join)(routing) for j, routing in routings.items()}


def _join(
    config: StackConfig, routing: Routing, batch: int, length: int, valid_bt: Any, mesh: Mesh
) -> Routing:
  """One layer's routing of microbatches [M, m / M, ...] as that of the batch."""

  def rows(a):
    parts = a.shape[0]
    by_row = a.reshape(parts, batch // parts, length, *a.shape[2:]).swapaxes(0, 1)
    return by_row.reshape(batch * length, *a.shape[2:])

  fields = {}
  for field in dataclasses.fields(Routing):
    value = getattr(routing, field.name)
    if value is None:
      continue
    if field.name == 'load_e':
      fields[field.name] = value.sum(0)
    elif value.ndim == 1:
      fields[field.name] = value.mean()
    else:
      fields[field.name] = rows(value)
  joined = Routing(**fields)
  assert config.moe is not None
  valid = valid_bt if config.moe.router_ignore_padding_tokens else None
  groups = config.moe.balance_groups or sharding.batch_ways(mesh)
  return router.with_losses(config.moe, joined, (batch, length), valid_bt=valid, groups=groups)
