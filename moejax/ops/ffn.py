"""Feed-forward blocks as functions: dense, and one of experts on tokens sorted by expert."""

from collections.abc import Callable, Mapping
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config import Act, Activation
from moejax.ops.expert_dot import expert_dot
from moejax.ops.linear import linear


def _gelu(x: jax.Array) -> jax.Array:
  """By erf as in PyTorch, which TPU kernels have; `jax.nn.gelu` goes by erfc, which they lack.

  In float32 at least: 1 + erf leaves few digits of a bfloat16.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return (0.5 * wide * (1.0 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'relu': jax.nn.relu,
    'gelu': _gelu,
    'gelu_new': functools.partial(jax.nn.gelu, approximate=True),
    'silu': jax.nn.silu,
    'drelu': jax.nn.relu,
}


def hidden_units(
    activation: Act, wi: jax.Array, gate: jax.Array | None = None
) -> jax.Array:
  """What wo multiplies, of the products of the input: act(wi), or act(gate) * wi.

  'drelu' (arXiv 2406.05955) is relu(gate) * relu(wi). Cuts are those of `config.CutsConfig`; shift
  and cut are of the gate's branch.
  """
  own = Activation(activation) if isinstance(activation, str) else activation
  turn = lambda x: _cut(ACTIVATIONS[own.name](x - own.shift if own.shift else x), own.cut)
  if gate is None:
    hidden = turn(wi)
  else:
    hidden = turn(gate) * (jax.nn.relu(wi) if own.name == 'drelu' else wi)
  return _cut(hidden, own.hidden_cut)


def _cut(x: jax.Array, size: float) -> jax.Array:
  return jnp.where(jnp.abs(x) > size, x, 0) if size else x


def dense_ffn(
    params: Mapping[str, Any], x: jax.Array, activation: Act, dropout=None
) -> jax.Array:
  """wo(act(wi x)), or wo(act(gate x) * (wi x)) where params hold a gate; x is [..., d].

  Biases wi_bias and gate_bias [f] and wo_bias [d] are added where params hold them.
  """
  return observed_ffn(params, x, activation, dropout)[0]


def observed_ffn(
    params: Mapping[str, Any], x: jax.Array, activation: Act, dropout=None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`dense_ffn`, its hidden units before dropout, and what the activation was applied to.

  The latter less the activation's shift.
  """

  def product(x, name):
    y = linear(x, params[name])
    if f'{name}_bias' in params:
      y = y + params[f'{name}_bias'].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    return y

  wi = product(x, 'wi')
  gate = product(x, 'gate') if 'gate' in params else None
  hidden = hidden_units(activation, wi, gate)
  y = product(hidden if dropout is None else dropout(hidden), 'wo')
  shift = 0.0 if isinstance(activation, str) else activation.shift
  return y, hidden, (wi if gate is None else gate) - shift


def expert_ffn(
    params: Mapping[str, Any],
    x_md: jax.Array,
    group_sizes_e: jax.Array,
    activation: Act,
    dropout=None,
) -> jax.Array:
  """The same block for rows sorted by expert; weights are [e, d, f] arrays or weight nodes.

  Biases are [e, f], that of wo [e, d].
  """
  def product(x, name):
    y = expert_dot(x, params[name], group_sizes_e)
    if f'{name}_bias' in params:
      y = y + _of_rows(params[f'{name}_bias'].astype(y.dtype), group_sizes_e, len(y))
    return y

  gate = product(x_md, 'gate') if 'gate' in params else None
  hidden = hidden_units(activation, product(x_md, 'wi'), gate)
  if dropout is not None:
    hidden = dropout(hidden)
  return product(hidden, 'wo')


def _of_rows(bias_ef: jax.Array, group_sizes_e: jax.Array, rows: int) -> jax.Array:
  """The bias of each row's expert, [m, f]; 0 past the last group."""
  expert_m = jnp.searchsorted(jnp.cumsum(group_sizes_e), jnp.arange(rows), side='right')
  return jnp.pad(bias_ef, ((0, 1), (0, 0)))[expert_m]
