"""A reference Phi-MoE's recorded outputs, without torch: windows, longrope, padding, training."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import tree
from moejax.convert import folder as convert
from moejax.model import apply_fn
from moejax.routing import draws as draws_lib
from moejax.routing import losses as losses_lib

VECTORS = pathlib.Path(__file__).parent.parent / 'vectors' / 'grin'
JITTER = {'router_jitter_noise': 0.5}
# What each case changes in the recorded config.json.
CASES = {
    'base': {}, 'jit05': JITTER, 'padmask': JITTER, 'window5': {**JITTER, 'sliding_window': 5},
    'longrope_short': JITTER, 'longrope_long': JITTER, 'train': JITTER,
}


@functools.cache
def arrays():
  with np.load(VECTORS / 'phimoe_tiny.npz') as f:
    return dict(f)


def longrope():
  """The factors, and the scale of long texts by the names of Phi-3.5's own config.json."""
  return {'rope_scaling': {
      'type': 'longrope', 'original_max_position_embeddings': 8,
      'short_factor': arrays()['longrope_short_factor'].tolist(),
      'long_factor': arrays()['longrope_long_factor'].tolist(),
      'short_mscale': 1.1, 'long_mscale': 1.3,
  }, 'rope_theta': 10000.0, 'hidden_dropout': 0.0}


@functools.cache
def load(case, folder, write):
  config = json.loads((VECTORS / 'phimoe_tiny_config.json').read_text()) | CASES[case]
  if case.startswith('longrope'):
    del config['rope_parameters']
    config |= longrope()
  return convert.from_hf(write(folder / case, arrays(), config))


@pytest.fixture(scope='module')
def model_of(tmp_path_factory, write_recorded):
  folder = tmp_path_factory.mktemp('recorded')
  return lambda case: load(case, folder, write_recorded)


def next_token_loss(logits, tokens, weights):
  log_probs = jax.nn.log_softmax(logits[:, :-1])
  of_label = jnp.take_along_axis(log_probs, tokens[:, 1:, None], -1)[..., 0]
  return -(of_label * weights[:, 1:]).sum() / weights[:, 1:].sum()


def losses(config, params, tokens, valid=None, **inputs):
  """The total that Hugging Face reports, and all that the vectors record beside it."""
  output = apply_fn(config, params, tokens, **inputs)
  weights = jnp.ones(tokens.shape) if valid is None else valid
  aux = losses_lib.pooled_load_balance_loss(
      [r.logits_me for r in output.routings.values()], config.moe.top_k, weights.reshape(-1)
  )
  plain = next_token_loss(output.logits_btv, tokens, weights)
  return plain + config.moe.router_aux_loss_coef * aux, (plain, aux, output)


def length_of(case):
  return 8 if case == 'longrope_short' else 12


@pytest.mark.long(but=('base', 'longrope_short', 'padmask'))
@pytest.mark.parametrize('case', [c for c in CASES if c != 'train'])
def test_evaluation(case, model_of):
  model, recorded = model_of(case), arrays()
  tokens = jnp.asarray(recorded['input_ids'][:, :length_of(case)], jnp.int32)
  valid = None
  if case == 'padmask':
    valid = jnp.asarray(recorded['padmask/attention_mask'], jnp.float32)
  run = jax.jit(lambda p: losses(model.config, p, tokens, valid))
  total, (_, aux, output) = run(model.params)
  real = np.ones(tokens.shape, bool) if valid is None else np.asarray(valid) > 0
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
  close(np.asarray(output.logits_btv)[real], recorded[f'{case}/logits'][real])
  for i, routing in enumerate(output.routings.values()):
    logits = np.asarray(routing.logits_me)[real.reshape(-1)]
    close(logits, recorded[f'{case}/router_logits/{i}'][real.reshape(-1)])
  close(aux, recorded[f'{case}/aux_loss'], atol=1e-5)
  close(total, recorded[f'{case}/loss_total'], atol=1e-5)


def test_long_texts_do_not_take_the_short_factors(model_of):
  """As transformers 5.23 does by mistake; the case would not notice if the factors were equal."""
  model, recorded = model_of('longrope_long'), arrays()
  short = apply_fn(model.config, model.params, jnp.asarray(recorded['input_ids'][:, :8], jnp.int32))
  long = recorded['longrope_long/logits'][:, :8]
  assert np.abs(np.asarray(short.logits_btv) - long).max() > 1e-3


def recorded_draws():
  return {
      f'decoder/layers_{i}/ffn': draws_lib.Draws(
          exponential=[arrays()[f'train/exp_draw{k}/{i}'] for k in (1, 2)],
          uniform=[arrays()[f'train/u_draw{k}/{i}'][:, 0] for k in (1, 2)],
      ) for i in range(2)
  }


@pytest.mark.long(but=('jit05',))
@pytest.mark.parametrize('case', ['jit05', 'train'])
def test_gradients(case, model_of):
  """Ours, written through the rules to Hugging Face's names and axes, are the recorded ones."""
  model, recorded = model_of(case), arrays()
  tokens = jnp.asarray(recorded['input_ids'], jnp.int32)
  train = {}
  if case == 'train':
    train = dict(train=True, key=jax.random.key(0), draws=recorded_draws())

  def loss(params):
    total, (plain, _, output) = losses(model.config, params, tokens, **train)
    return (plain if train else total), (plain, output)

  (total, (plain, output)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(model.params)
  np.testing.assert_allclose(output.logits_btv, recorded[f'{case}/logits'], rtol=0, atol=2e-5)
  name = 'loss' if train else 'loss_total'
  np.testing.assert_allclose(total, recorded[f'{case}/{name}'], rtol=0, atol=1e-5)
  theirs = by_their_names(model.config, grads)
  want = {k.removeprefix(f'{case}/grad/'): v for k, v in recorded.items()
          if k.startswith(f'{case}/grad/')}
  assert len(want) == 35
  for name, value in want.items():
    np.testing.assert_allclose(theirs[name], value, rtol=0, atol=5e-6, err_msg=name)


def by_their_names(config, grads):
  """Gradients by the fused names that transformers holds in memory."""
  flat, named = tree.flatten(grads), {}
  for entry in convert.entries(config):
    leaf = np.asarray(flat[entry.ours])
    for i, (name, *_) in enumerate(entry.names):
      named[name] = entry.to_theirs(leaf[i] if entry.stacked else leaf)
  result = {k.replace('block_sparse_moe.gate', 'mlp.router'): v for k, v in named.items()
            if '.experts.' not in k}
  for i in range(config.num_layers):
    prefix = f'model.layers.{i}.block_sparse_moe.experts'
    w1, w2, w3 = (
        np.stack([named[f'{prefix}.{e}.{w}.weight'] for e in range(config.moe.num_experts)])
        for w in ('w1', 'w2', 'w3')
    )
    result[f'model.layers.{i}.mlp.experts.gate_up_proj'] = np.concatenate([w1, w3], 1)
    result[f'model.layers.{i}.mlp.experts.down_proj'] = w2
  return result
