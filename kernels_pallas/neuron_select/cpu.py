"""Chosen experts in C++ for CPUs: each expert's matrices times the tokens that chose it.

Rows are read and written where they lie and nothing is padded: the products' time follows what was
chosen, from one token's experts to all experts of all tokens, which take what the dense layer does.
Between them lie hidden units of all experts, 0 where not chosen, as large as the dense layer's.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import extension
from kernels_pallas.neuron_select import ref


def supports(*dtypes: Any) -> str:
  """'' where `neuron_select` takes tokens and weights of these types, or why not."""
  if jax.device_count() > 1:
    return 'XLA cannot divide a foreign call over devices'
  return extension.without(*dtypes)


def neuron_select(
    x_md: jax.Array, experts: Mapping[str, jax.Array], chosen_me: jax.Array,
    act: Callable[..., jax.Array],
) -> jax.Array:
  """See `api.neuron_select`."""
  m, d = x_md.shape
  e, _, f = experts['wi'].shape
  up = extension.call(extension.CHOSEN_UP, jax.ShapeDtypeStruct((m, e, f), jnp.float32))
  down = extension.call(extension.CHOSEN_DOWN, jax.ShapeDtypeStruct((m, d), jnp.float32))

  def units(name):
    y_mef = up(x_md, chosen_me, experts[name])
    bias = experts.get(f'{name}_bias')
    return y_mef if bias is None else y_mef + bias.astype(y_mef.dtype)[None]

  hidden_mef = act(*(units(name) for name in ('wi', 'gate') if name in experts))
  y_md = down(hidden_mef.astype(x_md.dtype), chosen_me, experts['wo'])
  return ref.plus_output_bias(y_md, experts, chosen_me).astype(x_md.dtype)
