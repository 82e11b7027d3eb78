"""MC-SMoE's recorded arrays in this library's layouts."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moejax import safetensors_io
from moejax.convert import folder as convert
from moejax.model import apply_fn

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

  def batch(self, examples=16):
    """Token arrays of the first examples: (encoder, decoder, encoder mask, labels)."""
    names = ('in/input_ids', 'in/attention_mask', 'in/labels')
    first = {name: jnp.asarray(self.data[name][:examples], jnp.int32) for name in names}
    labels = first['in/labels']
    decoder = jnp.maximum(jnp.pad(labels, ((0, 0), (1, 0)))[:, :-1], 0)
    return first['in/input_ids'], decoder, first['in/attention_mask'] > 0, labels

  def model(self, folder):
    """The model, through a Hugging Face folder written to `folder`."""
    config = json.loads((FOLDER.parent / 'switch' / 'config.json').read_text()) | {
        'vocab_size': 96, 'd_model': 16, 'd_ff': 32, 'num_heads': 2, 'num_experts': 8,
        'relative_attention_num_buckets': 32, 'relative_attention_max_distance': 128,
    }
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config))
    tensors = ((k[6:], v) for k, v in self.data.items() if k.startswith('param/'))
    safetensors_io.write_folder(folder, tensors)
    return convert.from_hf(folder)

  def loss(self, config, params):
    """Hugging Face's: cross-entropy, and each stack's balance and z loss times 0.001."""
    tokens, decoder, mask, labels = self.batch()
    output = apply_fn(config, params, tokens, decoder, encoder_mask=mask)
    log_probs, real = jax.nn.log_softmax(output.logits_btv), labels >= 0
    own = jnp.take_along_axis(log_probs, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    total = -(own * real).sum() / real.sum()
    for stack in ('encoder', 'decoder'):
      chosen = [r for path, r in output.routings.items() if path.startswith(stack)]
      logits = jnp.concatenate([r.logits_me.reshape(16, -1, 8) for r in chosen], 1)
      share = jax.nn.one_hot(logits.argmax(-1), 8).mean(1)
      balance = (share * jax.nn.softmax(logits).mean(1)).mean() * 64
      total += 0.001 * (balance + (jax.nn.logsumexp(logits, axis=-1) ** 2).mean())
    return total

  def inputs_of(self, layer):
    x, choice = self.inputs(layer), self.choice(layer)
    return [x[choice == e] for e in range(8)]


def layer_path(layer):
  return ('encoder' if layer[:3] == 'enc' else 'decoder', f'layers_{layer[3]}', 'ffn')


def ours(wi_egfd, wo):
  """Published [.., out, in] to ours."""
  return {'wi': np.swapaxes(wi_egfd, -1, -2), 'wo': np.swapaxes(wo, -1, -2)}
