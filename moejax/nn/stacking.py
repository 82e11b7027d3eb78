"""Params with layers that are alike stacked, so that one program runs them all.

`decoder/layers_0` ... become `decoder/blocks/layer_j` with a leading axis: block n holds layers
n * period to (n + 1) * period, and layer_j is the j-th of each; an encoder likewise. Training scans
over blocks and lays a decoder's over pipeline stages; everything else keeps a layer's params by
themselves, since compression makes layers differ.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config import ModelConfig, StackConfig

BLOCKS = 'blocks'


def period(config: ModelConfig, stack: str = 'decoder') -> int:
  """The least number of layers after which kinds of layers repeat; it divides their number."""
  n, sparse = config.layers_of(stack), config.sparse_layers(stack)
  window = config.window_of if isinstance(config, StackConfig) else lambda i: None
  kinds = [(i in sparse, window(i), config.of_layer(stack, i)) for i in range(n)]
  return next(
      p for p in range(1, n + 1)
      if n % p == 0 and all(kinds[i] == kinds[i % p] for i in range(n))
  )


def is_stacked(params: Mapping[str, Any]) -> bool:
  """Whether a model's params are stacked."""
  return any(isinstance(own, Mapping) and BLOCKS in own for own in params.values())


def stack(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
  """Params with layers stacked; arrays, or shapes (ShapeDtypeStructs)."""

  def one(name: str) -> dict[str, Any]:
    step, own = period(config, name), params[name]
    layers = [own[f'layers_{i}'] for i in range(config.layers_of(name))]
    blocks = {
        f'layer_{j}': jax.tree.map(lambda *rows: _join(rows), *layers[j::step])
        for j in range(step)
    }
    rest = {key: value for key, value in own.items() if not key.startswith('layers_')}
    return {**rest, BLOCKS: blocks}

  return {**params, **{name: one(name) for name in config.stacks}}


def _join(rows: tuple[Any, ...]) -> Any:
  if isinstance(rows[0], jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct((len(rows), *rows[0].shape), rows[0].dtype)
  return jnp.stack(rows)


def unstack(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
  """The inverse of `stack`."""

  def one(name: str) -> dict[str, Any]:
    step, own = period(config, name), params[name]
    rest = {key: value for key, value in own.items() if key != BLOCKS}
    layers = {
        f'layers_{i}': jax.tree.map(lambda a, n=i // step: a[n], own[BLOCKS][f'layer_{i % step}'])
        for i in range(config.layers_of(name))
    }
    return {**rest, **layers}

  return {**params, **{name: one(name) for name in config.stacks}}
