"""The tiny trained Switch model of the reference vectors, as a moejax model and batches."""

import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from moejax import tree
from moejax.config import EncDecConfig, EncDecMoeConfig
from moejax.model import Model

VECTORS = Path(__file__).parents[1] / 'vectors' / 'qmoe'


@functools.cache
def arrays():
  with np.load(VECTORS / 'e2e_switch_tiny.npz') as f:
    return dict(f)


@functools.cache
def model() -> Model:
  """The vectors' weights under our names."""
  data = arrays()
  hf = json.loads(str(data['config_json']))
  config = EncDecConfig(
      vocab_size=hf['vocab_size'], d_model=hf['d_model'], d_kv=hf['d_kv'], d_ff=hf['d_ff'],
      num_heads=hf['num_heads'], num_layers=hf['num_layers'],
      num_decoder_layers=hf['num_decoder_layers'],
      relative_attention_num_buckets=hf['relative_attention_num_buckets'],
      relative_attention_max_distance=hf['relative_attention_max_distance'],
      moe=EncDecMoeConfig(
          num_experts=hf['num_experts'], router_jitter_noise=0.0, expert_capacity=64
      ),
  )
  weight = lambda name: data[f'w/{name}.weight']
  embedding = np.zeros((config.vocab_size, config.d_model), np.float32)
  embedding[data['w/embed_ids']] = data['w/embed_rows']
  flat = {'shared/embedding': embedding}
  for stack in ('encoder', 'decoder'):
    first = f'{stack}.block.0.layer.0.SelfAttention'
    flat[f'{stack}/relative_bias'] = weight(f'{first}.relative_attention_bias')
    flat[f'{stack}/final_norm'] = weight(f'{stack}.final_layer_norm')
    for i in range(2):
      _layer(flat, config, weight, stack, i)
  return Model(config, tree.unflatten({k: jnp.asarray(v) for k, v in flat.items()}))


def _layer(flat, config, weight, stack, i):
  heads, width, d = config.num_heads, config.d_kv, config.d_model
  block, ours = f'{stack}.block.{i}', f'{stack}/layers_{i}'
  names = {'encoder': {'attention': 'SelfAttention'},
           'decoder': {'self_attention': 'SelfAttention', 'cross_attention': 'EncDecAttention'}}
  for j, (name, theirs) in enumerate(names[stack].items()):
    flat[f'{ours}/{name}/norm'] = weight(f'{block}.layer.{j}.layer_norm')
    for p in 'qkv':
      flat[f'{ours}/{name}/{p}'] = weight(f'{block}.layer.{j}.{theirs}.{p}').T.reshape(
          d, heads, width
      )
    flat[f'{ours}/{name}/o'] = weight(f'{block}.layer.{j}.{theirs}.o').T.reshape(heads, width, d)
  last = f'{block}.layer.{len(names[stack])}'
  flat[f'{ours}/ffn/norm'] = weight(f'{last}.layer_norm')
  if i == 0:
    for p in ('wi', 'wo'):
      flat[f'{ours}/ffn/{p}'] = weight(f'{last}.mlp.{p}').T
    return
  flat[f'{ours}/ffn/router/kernel'] = weight(f'{last}.mlp.router.classifier').T
  for p in ('wi', 'wo'):
    flat[f'{ours}/ffn/experts/{p}'] = np.stack([
        weight(f'{last}.mlp.experts.expert_{e}.{p}').T for e in range(config.moe.num_experts)
    ])


def batches(first: int, last: int) -> list[dict[str, np.ndarray]]:
  """Samples first..last, one a batch; the loss of a sample counts with its decoder length."""
  data = arrays()
  starts = {k: np.cumsum(data[f'{k}_len']) - data[f'{k}_len'] for k in ('enc', 'dec')}
  out = []
  for i in range(first, last):
    enc, dec = (
        data[f'{k}_tok'][starts[k][i] : starts[k][i] + data[f'{k}_len'][i]] for k in ('enc', 'dec')
    )
    n = len(dec)
    weights = np.append(np.full(n - 1, n / (n - 1), np.float32), np.float32(0))
    out.append({
        'encoder_tokens': enc[None], 'decoder_tokens': dec[None],
        'targets': np.append(dec[1:], 0)[None], 'weights': weights[None],
        'decoder_mask': np.ones((1, n), bool),
    })
  return out
