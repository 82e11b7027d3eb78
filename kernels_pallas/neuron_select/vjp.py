"""Chosen experts, differentiable: forward by the chosen path, backward by the dense products."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import numpy as np

from kernels_pallas.neuron_select import api, ref


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def neuron_select(
    x_md: jax.Array, experts: Mapping[str, Any], chosen_me: jax.Array,
    act: Callable[..., jax.Array],
) -> jax.Array:
  """`api.neuron_select`, differentiable in the tokens and the experts."""
  return api.neuron_select(x_md, experts, chosen_me, act)


def _forward(x_md, experts, chosen_me, act):
  return neuron_select(x_md, experts, chosen_me, act), (x_md, experts, chosen_me)


def _backward(act, residuals, dy_md):
  x_md, experts, chosen_me = residuals
  whole = lambda x, own: ref.everything(x, own, chosen_me, act).astype(x.dtype)
  dx_md, d_experts = jax.vjp(whole, x_md, experts)[1](dy_md)
  return dx_md, d_experts, np.zeros(chosen_me.shape, jax.dtypes.float0)


neuron_select.defvjp(_forward, _backward)
