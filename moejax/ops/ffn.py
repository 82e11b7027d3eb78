"""Feed-forward blocks as functions: dense, and one of experts on tokens sorted by expert."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax

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
  """The same block for rows sorted by expert; weights are [e, d, f] arrays or weight nodes."""
  act = ACTIVATIONS[activation]
  hidden = expert_dot(x_md, params['wi'], group_sizes_e)
  if 'gate' in params:
    hidden = act(expert_dot(x_md, params['gate'], group_sizes_e)) * hidden
  else:
    hidden = act(hidden)
  if dropout is not None:
    hidden = dropout(hidden)
  return expert_dot(hidden, params['wo'], group_sizes_e)
