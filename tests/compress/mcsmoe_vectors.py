"""MC-SMoE's recorded arrays in this library's layouts."""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parents[1] / 'vectors' / 'mcsmoe'
LAYERS = ('enc1', 'dec1', 'enc3', 'dec3')  # The published order: by block, encoder first.


def load(name):
  return dict(np.load(FOLDER / f'{name}.npz'))


class Switch:
  """The tiny Switch Transformer: experts, routers, and what its sparse layers saw."""

  def __init__(self):
    self.data = load('switch_model')

  def prefix(self, layer):
    stack, block = ('encoder', layer[3]) if layer[:3] == 'enc' else ('decoder', layer[3])
    return f'param/{stack}.block.{block}.layer.{1 if stack == "encoder" else 2}.mlp'

  def experts(self, layer):
    one = lambda e, name: self.data[f'{self.prefix(layer)}.experts.expert_{e}.{name}.weight'].T
    return {name: np.stack([one(e, name) for e in range(8)]) for name in ('wi', 'wo')}

  def router(self, layer):
    return self.data[f'{self.prefix(layer)}.router.classifier.weight'].T

  def inputs(self, layer):
    return self.data[f'mlp_input/{layer}'].reshape(-1, 16)

  def logits(self, layer):
    return self.data[f'router_logits/{layer}'].reshape(-1, 8)

  def choice(self, layer):
    return self.data[f'expert_index/{layer}'].reshape(-1)

  def inputs_of(self, layer):
    x, choice = self.inputs(layer), self.choice(layer)
    return [x[choice == e] for e in range(8)]


def ours(wi_egfd, wo):
  """Published [.., out, in] to ours."""
  return {'wi': np.swapaxes(wi_egfd, -1, -2), 'wo': np.swapaxes(wo, -1, -2)}
