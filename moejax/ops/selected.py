"""The feed-forward block of experts that a dense one was split into: chosen ones, added up."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.neuron_select import ref, vjp
from moejax import tree
from moejax.config import Act
from moejax.ops import ffn, moe
from moejax.routing.types import Routing

# As many tokens as are gathered in large blocks.
MANY_TOKENS = ref.SMALL_TOKENS + 1


def selected_ffn(
    experts: Mapping[str, Any], x_btd: jax.Array, routing: Routing, activation: Act
) -> jax.Array:
  """Sum over a token's kept choices of expert(x), [b, t, d]; on one device.

  Experts that are weight nodes go by `moe.moe_ffn`, whose gates are the routing's, here 1.
  """
  if not all(tree.is_array(w) for w in experts.values()):
    return moe.moe_ffn(experts, x_btd, routing, activation)[0]
  x_md = x_btd.reshape(-1, x_btd.shape[-1])
  y_md = vjp.neuron_select(x_md, experts, chosen(routing), _units(activation))
  return y_md.reshape(x_btd.shape)


def dense_share(tokens: int, expert_size: int) -> float:
  """The share of pairs above which XLA computes all experts, as measured; in C++ none is."""
  return ref.all_from(tokens, expert_size)


@functools.lru_cache
def _units(activation: Act) -> Callable[..., jax.Array]:
  """One function for each activation: what is compiled goes by its identity."""
  return functools.partial(ffn.hidden_units, activation)


def chosen(routing: Routing) -> jax.Array:
  """Which experts each token meets, bool [m, e]."""
  m, experts = routing.logits_me.shape
  none_me = jnp.zeros((m, experts), bool)
  return none_me.at[jnp.arange(m)[:, None], routing.choice_mk].max(routing.keep_mk)


def activation_mass(
    experts: Mapping[str, Any], x_btd: jax.Array, activation: Act
) -> jax.Array:
  """Summed sizes of each expert's hidden units, float32 [b, t, e] (MoEfication, 2110.01786)."""
  x_md = x_btd.reshape(-1, x_btd.shape[-1]).astype(jnp.float32)
  hidden = ref.hidden_units(x_md, experts, _units(activation))
  return jnp.abs(hidden).sum(-1).reshape(*x_btd.shape[:2], -1)
