"""Worker: training a MoE against a dense decoder of equal active parameters, and where time goes.

The parts are measured by themselves, forward and backward, times the layers: what XLA overlaps or
fuses in a whole step is not in them, so they need not add up to the difference.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import decoder_problem as problem
from experiments.bench import timing, train_call
from moejax import config as config_lib
from moejax.model import Model
from moejax.ops import ffn, moe
from moejax.routing import dispatch, router

Call = Callable[[], Any]


def models(quick: bool) -> dict[str, config_lib.DecoderConfig]:
  """The MoE, and the dense one whose FFN is as wide as the experts that a token meets."""
  c = problem.config(quick)
  width, chosen = c['intermediate_size'], c['num_experts_per_tok']
  sparse = config_lib.DecoderConfig(
      family='grin', vocab_size=c['vocab_size'], d_model=c['hidden_size'], norm='layer',
      d_head=c['hidden_size'] // c['num_attention_heads'], d_ff=width * chosen,
      num_heads=c['num_attention_heads'], num_kv_heads=c['num_key_value_heads'],
      num_layers=c['num_hidden_layers'], max_positions=1024, eos_ids=(1,),
      moe=config_lib.DecoderMoeConfig(
          num_experts=c['num_local_experts'], top_k=chosen, router='sparsemixer_v2', d_ff=width,
          jitter_eps=0.01, router_aux_loss_coef=0.01,
      ),
  )
  return {'MoE': sparse, 'dense': dataclasses.replace(sparse, moe=None)}


def both_ways(fn: Callable[..., jax.Array], *args: Any) -> Call:
  """Forward, and backward from a gradient of ones to every argument, compiled."""

  def run(*args):
    y, pull = jax.vjp(fn, *args)
    return pull(jnp.ones_like(y))

  compiled = jax.jit(run).lower(*args).compile()
  return lambda: jax.block_until_ready(compiled(*args))


def update(run: config_lib.Experiment, params: Any) -> Call:
  """The optimizer's update and its application to a model's parameters."""
  import optax

  optimizer = train_call.optimizer(run)

  def one(params, grads, state):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  compiled = jax.jit(one, donate_argnums=(0, 2))
  grads = jax.tree.map(lambda p: jnp.full_like(p, 1e-3), params)
  held = [(jax.tree.map(jnp.copy, params), optimizer.init(params))]

  def call() -> None:
    held[0] = jax.block_until_ready(compiled(held[0][0], grads, held[0][1]))

  return call


def layer_calls(
    configs: dict[str, config_lib.DecoderConfig], params: dict[str, Any], batch: int, length: int,
    dtype: Any,
) -> dict[str, dict[str, Call]]:
  """Part -> who -> a call that does it for one layer."""
  c = configs['MoE']
  m: Any = c.moe
  x = jax.random.normal(jax.random.key(0), (batch, length, c.d_model), dtype)
  sparse, dense = (params[name]['decoder']['layers_0']['ffn'] for name in ('MoE', 'dense'))
  cast = lambda tree: jax.tree.map(lambda a: a.astype(dtype), tree)
  experts = cast(sparse['experts'])
  weights = {name: w for name, w in cast(dense).items() if not name.startswith('norm')}
  key = jax.random.key(1)

  def choose(x, kernel):
    return router.route(m, router.router_logits({'kernel': kernel}, x), key=key)

  def gates(x, kernel):
    routing = choose(x, kernel)
    return routing.gate_mk.sum() + routing.load_balance_loss

  routing = jax.jit(choose)(x, sparse['router']['kernel'])
  order, _, sizes = dispatch.sort_by_expert(routing.choice_mk, routing.keep_mk, m.num_experts)
  flat = x.reshape(-1, c.d_model)
  rows = dispatch.permute(flat, order, jnp.argsort(order).astype(jnp.int32))

  def there_and_back(x, gate_mk):
    y = dispatch.apply_experts(
        x, routing.choice_mk, routing.keep_mk, m.num_experts, lambda rows, sizes, pair: rows
    )
    return moe.combine(y, dataclasses.replace(routing, gate_mk=gate_mk))

  return {
      'router': {'MoE': both_ways(gates, x, sparse['router']['kernel'])},
      'dispatch and return': {'MoE': both_ways(there_and_back, flat, routing.gate_mk)},
      'experts or dense FFN': {
          'MoE': both_ways(lambda p, r: ffn.expert_ffn(p, r, sizes, c.activation), experts, rows),
          'dense': both_ways(lambda p, r: ffn.dense_ffn(p, r, c.activation), weights, flat),
      },
  }


def rows_of(case: str, metric: str, times: dict[str, list[float]], unit: str = 's') -> list[Any]:
  return [
      timing.row(case, metric, who, samples, unit, ours=who == 'MoE')
      for who, samples in times.items()
  ]


def case_rows(quick: bool, dtype: str) -> list[dict[str, Any]]:
  batch, length = (2, 16) if quick else (16, 512)
  case, configs = f'{dtype}, {batch} x {length} tokens a step', models(quick)
  runs = {n: train_call.experiment(c, batch, dtype) for n, c in configs.items()}
  data = train_call.batch_of(quick, batch, length)
  params = {n: Model.init(c, jax.random.key(0)).params for n, c in configs.items()}
  # One model after the other: taking turns, each step's buffers found what the other had left too
  # small, and kept memory grew to 24 GB.
  times: dict[str, list[float]] = {}
  for n, run in runs.items():
    call = {n: train_call.training_step(run, data, params[n])}
    times |= timing.measure(call, repeats=5, warmup=1, budget_s=60.0)
    del call
  tokens = batch * length
  rows = rows_of(
      case, 'training', {n: [tokens / s for s in t] for n, t in times.items()}, 'tokens/s'
  )
  rows += rows_of(case, 'training step', times)
  layers = configs['MoE'].num_layers
  for part, calls in layer_calls(configs, params, batch, length, jnp.dtype(dtype)).items():
    times = timing.measure(calls, repeats=5, warmup=1, budget_s=10.0)
    rows += rows_of(case, f'{part}, all layers', {n: [layers * s for s in t]
                                                  for n, t in times.items()})
  updates = {n: update(run, params[n]) for n, run in runs.items()}
  return rows + rows_of(case, 'optimizer', timing.measure(updates, repeats=5, warmup=1))


def main(quick: bool) -> list[dict[str, Any]]:
  return [row for dtype in problem.dtypes_where_slow(quick) for row in case_rows(quick, dtype)]


if __name__ == '__main__':
  timing.run(main)
