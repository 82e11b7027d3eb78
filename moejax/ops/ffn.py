"""Feed-forward blocks as functions: dense, and one of experts on tokens sorted by expert."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from moejax.ops.expert_dot import expert_dot
from moejax.ops.linear import linear

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'relu': jax.nn.relu,
    'gelu': functools.partial(jax.nn.gelu, approximate=False),
    'gelu_new': functools.partial(jax.nn.gelu, approximate=True),
    'silu': jax.nn.silu,
}


def dense_ffn(
    params: Mapping[str, Any], x: jax.Array, activation: str, dropout=None
) -> jax.Array:
  """wo(act(wi x)), or wo(act(gate x) * (wi x)) where params hold a gate; x is [..., d].

  Biases wi_bias and gate_bias [f] and wo_bias [d] are added where params hold them.
  """
  act = ACTIVATIONS[activation]

  def product(x, name):
    y = linear(x, params[name])
    if f'{name}_bias' in params:
      y = y + params[f'{name}_bias'].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    return y

  hidden = product(x, 'wi')
  if 'gate' in params:
    hidden = act(product(x, 'gate')) * hidden
  else:
    hidden = act(hidden)
  if dropout is not None:
    hidden = dropout(hidden)
  return product(hidden, 'wo')


def expert_ffn(
    params: Mapping[str, Any],
    x_md: jax.Array,
    group_sizes_e: jax.Array,
    activation: str,
    dropout=None,
) -> jax.Array:
  """The same block for rows sorted by expert; weights are [e, d, f] arrays or weight nodes.

  Biases are [e, f], that of wo [e, d].
  """
  act = ACTIVATIONS[activation]

  def product(x, name):
    y = expert_dot(x, params[name], group_sizes_e)
    if f'{name}_bias' in params:
      y = y + _of_rows(params[f'{name}_bias'].astype(y.dtype), group_sizes_e, len(y))
    return y

  if 'gate' in params:
    hidden = act(product(x_md, 'gate')) * product(x_md, 'wi')
  else:
    hidden = act(product(x_md, 'wi'))
  if dropout is not None:
    hidden = dropout(hidden)
  return product(hidden, 'wo')


def _of_rows(bias_ef: jax.Array, group_sizes_e: jax.Array, rows: int) -> jax.Array:
  """The bias of each row's expert, [m, f]; 0 past the last group."""
  expert_m = jnp.searchsorted(jnp.cumsum(group_sizes_e), jnp.arange(rows), side='right')
  return jnp.pad(bias_ef, ((0, 1), (0, 0)))[expert_m]
