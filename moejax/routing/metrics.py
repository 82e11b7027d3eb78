"""The health of a router: sums that add up over microbatches, batches and shards, then means."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moejax.routing.types import Routing

Metrics = dict[str, jax.Array]

# What `sums` counts.
SUMS = (
    'load', 'tokens', 'candidates', 'gates_of_one', 'routed', 'no_router_gradient', 'entropy',
)
# What `finish` makes of the sums of one router, one number each.
NAMES = (
    'load_entropy', 'router_entropy', 'dropped', 'candidates', 'gates_of_one',
    'no_router_gradient',
)


def sums(routing: Routing, valid_m: jax.Array | None = None) -> Metrics:
  """What `finish` needs of one Routing, float32; add them up over parts of a batch.

  Args:
    routing: of m tokens.
    valid_m: bool, the tokens that were to be routed; None: all, padding too.

  Returns:
    load: [e], kept choices. tokens: choices wanted, kept or not. candidates: experts that those
    were made among. gates_of_one: kept choices whose output is weighted with exactly 1. routed:
    tokens. no_router_gradient: tokens whose choices had one candidate each, so that no gate
    depends on the router. entropy: of the tokens' router probabilities, in nats.
  """
  m, k = routing.choice_mk.shape
  if valid_m is None:
    valid_m = jnp.ones(m, bool)
  candidates_mk = routing.candidates_mk
  if candidates_mk is None:
    open_m1 = jnp.isfinite(routing.logits_me).sum(-1, keepdims=True, dtype=jnp.int32)
    candidates_mk = jnp.broadcast_to(open_m1, (m, k))
  choice_mk = (candidates_mk > 0) & valid_m[:, None]
  weight_mk = routing.gate_mk
  if routing.scale_mk is not None:
    weight_mk = weight_mk * routing.scale_mk
  count = lambda x: jnp.sum(x, dtype=jnp.float32)
  log_p_me = jax.nn.log_softmax(routing.logits_me)
  # An expert that a token may not choose has probability 0.
  entropy_m = -jnp.sum(jnp.where(jnp.isfinite(log_p_me), jnp.exp(log_p_me) * log_p_me, 0.0), -1)
  return {
      'load': routing.load_e.astype(jnp.float32),
      'tokens': count(choice_mk),
      'candidates': count(candidates_mk * choice_mk),
      'gates_of_one': count((weight_mk == 1.0) & routing.keep_mk & choice_mk),
      'routed': count(valid_m),
      'no_router_gradient': count((candidates_mk <= 1).all(-1) & valid_m),
      'entropy': count(jnp.where(valid_m, entropy_m, 0.0)),
  }


def finish(total: Mapping[str, jax.Array]) -> Metrics:
  """Means from the sums of one router.

  Returns:
    load: [e], each expert's share of the kept choices. load_entropy: its entropy (nats; ln e is
    even). router_entropy: of a token's router probabilities (nats), the mean. dropped: share of
    the wanted choices that were not kept. candidates: mean number of experts that a choice was
    made among. gates_of_one: share of the kept choices. no_router_gradient: share of the tokens.
  """
  kept = total['load'].sum()
  share = total['load'] / jnp.maximum(kept, 1.0)
  wanted = jnp.maximum(total['tokens'], 1.0)
  routed = jnp.maximum(total['routed'], 1.0)
  return {
      'load': share,
      'load_entropy': -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-20))),
      'router_entropy': total['entropy'] / routed,
      'dropped': jnp.maximum(1.0 - kept / wanted, 0.0),
      'candidates': total['candidates'] / wanted,
      'gates_of_one': total['gates_of_one'] / jnp.maximum(kept, 1.0),
      'no_router_gradient': total['no_router_gradient'] / routed,
  }


def layer_sums(routings: Mapping[str, Routing], valid: Mapping[str, jax.Array | None]) -> Metrics:
  """`sums` of each layer as 'name/path'; valid: by path, see there."""
  return {
      f'{name}/{path}': value
      for path, routing in routings.items()
      for name, value in sums(routing, valid.get(path)).items()
  }


def finish_layers(metrics: Mapping[str, jax.Array]) -> Metrics:
  """Replaces the 'name/path' sums by their means, and adds the mean over layers of each of NAMES.

  Other entries stay as they are.
  """
  paths = [name.removeprefix('load/') for name in metrics if name.startswith('load/')]
  used: set[str] = set()
  done: Metrics = {}
  for path in paths:
    total = {name: metrics[f'{name}/{path}'] for name in SUMS}
    used |= {f'{name}/{path}' for name in total}
    done |= {f'{name}/{path}': value for name, value in finish(total).items()}
  for name in NAMES if paths else ():
    done[name] = jnp.stack([done[f'{name}/{path}'] for path in paths]).mean()
  return {**{name: value for name, value in metrics.items() if name not in used}, **done}

