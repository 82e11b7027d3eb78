"""as_dense(model): the experts that a dense layer was split into, side by side again."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from moejax import tree
from moejax.compress import base
from moejax.errors import UserError
from moejax.model import Model


def as_dense(model: Model) -> Model:
  """The dense model that runs all experts of a split one: for export, or where nothing is won.

  Its neurons keep their new order, and output matrices that were fitted stay so; constants that
  stood for experts that do not run are gone.

  Raises:
    UserError: the experts are not those of split layers, or they are compressed.
  """
  config = model.config
  if config.moe is None or config.moe.selection is None:
    raise UserError(f'this {config.family} model has no layers that were split into experts')
  flat: dict[str, Any] = {}
  layers: dict[str, dict[str, Any]] = {}
  for path, leaf in tree.flatten(model.params).items():
    layer, found, name = path.partition('/ffn/')
    if found and name.startswith(('experts/', 'shared/', 'router/', 'wo_bias')):
      layers.setdefault(f'{layer}/ffn', {})[name] = leaf
    else:
      flat[path] = leaf
  biased = bool(getattr(config, 'ffn_bias', False))
  for layer, own in layers.items():
    for name in ('wi', 'gate', 'wo', 'wi_bias', 'gate_bias'):
      if f'experts/{name}' not in own:
        continue
      base.require_array(f'{layer}/experts/{name}', own[f'experts/{name}'], 'as_dense')
      axis = 0 if name == 'wo' else -1
      pieces = [own[f'shared/{name}']] if f'shared/{name}' in own else []
      flat[f'{layer}/{name}'] = jnp.concatenate([*pieces, *own[f'experts/{name}']], axis)
    if biased:
      # What all experts take off together is what the layer's bias holds too much.
      off = own.get('experts/wo_bias')
      bias = own['wo_bias']
      flat[f'{layer}/wo_bias'] = bias if off is None else bias + off.sum(0).astype(bias.dtype)
  return Model(dataclasses.replace(config, moe=None), tree.unflatten(flat))
