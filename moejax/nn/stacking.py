"""Decoder params with layers that are alike stacked, so that one program runs them all.

`decoder/layers_0` ... become `decoder/blocks/layer_j` with a leading axis: block n holds layers
n * period to (n + 1) * period, and layer_j is the j-th of each. Training scans over blocks and lays
them over pipeline stages; everything else keeps a layer's params by themselves, since compression
makes layers differ.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config import DecoderConfig

BLOCKS = 'blocks'


def period(config: DecoderConfig) -> int:
  """The least number of layers after which kinds of layers repeat; it divides their number."""
  kinds = [
      (i in config.sparse_layers(), config.window_of(i)) for i in range(config.num_layers)
  ]
  n = config.num_layers
  return next(
      p for p in range(1, n + 1)
      if n % p == 0 and all(kinds[i] == kinds[i % p] for i in range(n))
  )


def is_stacked(params: Mapping[str, Any]) -> bool:
  """Whether a decoder's params are stacked."""
  return BLOCKS in params.get('decoder', {})


def stack(params: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
  """Params with layers stacked; arrays, or shapes (ShapeDtypeStructs)."""
  step, own = period(config), params['decoder']
  layers = [own[f'layers_{i}'] for i in range(config.num_layers)]
  blocks = {
      f'layer_{j}': jax.tree.map(lambda *rows: _join(rows), *layers[j::step]) for j in range(step)
  }
  rest = {name: value for name, value in own.items() if not name.startswith('layers_')}
  return {**params, 'decoder': {**rest, BLOCKS: blocks}}


def _join(rows: tuple[Any, ...]) -> Any:
  if isinstance(rows[0], jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct((len(rows), *rows[0].shape), rows[0].dtype)
  return jnp.stack(rows)


def unstack(params: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
  """The inverse of `stack`."""
  step, own = period(config), params['decoder']
  rest = {name: value for name, value in own.items() if name != BLOCKS}
  layers = {
      f'layers_{i}': jax.tree.map(lambda a, n=i // step: a[n], own[BLOCKS][f'layer_{i % step}'])
      for i in range(config.num_layers)
  }
  return {**params, 'decoder': {**rest, **layers}}
