"""A reference Switch Transformer's recorded outputs, without torch: drops, losses, gradients."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import tree
from moejax.convert import folder as convert
from moejax.model import apply_fn

VECTORS = pathlib.Path(__file__).parent.parent / 'vectors' / 'switch'


@pytest.fixture(scope='module')
def arrays():
  with np.load(VECTORS / 'switch_tiny.npz') as f:
    return dict(f)


def hf_aux(routings, stack, batch):
  """Hugging Face pools a stack's layers along the sequence before its load-balancing loss."""
  chosen = [r for path, r in routings.items() if path.startswith(stack)]
  e = chosen[0].logits_me.shape[-1]
  logits = jnp.concatenate([r.logits_me.reshape(batch, -1, e) for r in chosen], 1)
  share = jax.nn.one_hot(logits.argmax(-1), e).mean(1)
  aux = (share * jax.nn.softmax(logits).mean(1)).mean() * e**2
  return aux, (jax.nn.logsumexp(logits, axis=-1) ** 2).mean()


def forward(config, params, arrays, masked):
  labels = jnp.asarray(arrays['labels'], jnp.int32)
  decoder = jnp.pad(labels, ((0, 0), (1, 0)))[:, :-1]
  tokens = jnp.asarray(arrays['input_ids'], jnp.int32)
  mask = arrays['attention_mask'] if masked else np.ones_like(arrays['input_ids'])
  output = apply_fn(config, params, tokens, decoder, encoder_mask=jnp.asarray(mask, bool))
  log_probs = jax.nn.log_softmax(output.logits_btv)
  total = -jnp.take_along_axis(log_probs, labels[..., None], -1).mean()
  losses = {}
  for stack in ('encoder', 'decoder'):
    aux, z = hf_aux(output.routings, stack, labels.shape[0])
    losses |= {f'{stack}_aux_loss': aux, f'{stack}_z_loss': z}
    total += config.moe.router_z_loss_coef * z + config.moe.router_aux_loss_coef * aux
  return total, (output, losses)


@pytest.fixture(scope='module')
def runs(arrays, tmp_path_factory, write_recorded):
  """Model, outputs and gradients of the three recorded cases."""
  results = {}
  for case, capacity in (('base', 64), ('cap2', 2), ('mask', 64)):
    folder = tmp_path_factory.mktemp('hf') / 'model'
    config = json.loads((VECTORS / 'config.json').read_text()) | {'expert_capacity': capacity}
    model = convert.from_hf(write_recorded(folder, arrays, config))
    run = jax.jit(lambda p, c=model.config, m=case == 'mask': forward(c, p, arrays, m))
    if case == 'base':
      run = jax.jit(jax.value_and_grad(
          lambda p, c=model.config: forward(c, p, arrays, False), has_aux=True
      ))
      (total, (output, losses)), grads = run(model.params)
    else:
      (total, (output, losses)), grads = run(model.params), None
    results[case] = model, output, {**losses, 'loss_total': total}, grads
  return results


@pytest.mark.parametrize('case', ['base', 'cap2', 'mask'])
def test_logits(case, runs, arrays):
  output = runs[case][1]
  np.testing.assert_allclose(output.logits_btv, arrays[f'{case}/logits'], rtol=0, atol=5e-5)
  expected = arrays[f'{case}/encoder_last_hidden_state']
  np.testing.assert_allclose(output.encoder_bsd, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize('case', ['base', 'cap2', 'mask'])
def test_routing(case, runs, arrays):
  model, output, _, _ = runs[case]
  for path, routing in output.routings.items():
    stack, layer, _ = path.split('/')
    name = f'{stack}.block.{layer[7:]}.layer.{1 if stack == "encoder" else 2}.mlp.router'
    prefix = f'{case}/router/{name}'
    expected = arrays[f'{prefix}/dispatch_onehot']
    onehot = np.zeros((routing.choice_mk.shape[0], model.config.moe.num_experts), np.int8)
    kept = np.asarray(routing.keep_mk[:, 0])
    onehot[np.flatnonzero(kept), np.asarray(routing.choice_mk[:, 0])[kept]] = 1
    np.testing.assert_array_equal(onehot.reshape(expected.shape), expected)
    np.testing.assert_array_equal(routing.load_e, expected.sum((0, 1)))
    logits = arrays[f'{prefix}/logits'].reshape(routing.logits_me.shape)
    np.testing.assert_allclose(routing.logits_me, logits, rtol=0, atol=5e-5)
    gates = arrays[f'{prefix}/prob'].reshape(-1) * kept
    np.testing.assert_allclose(routing.gate_mk[:, 0], gates, rtol=0, atol=5e-5)
  if case == 'cap2':
    assert any(not r.keep_mk.all() for r in output.routings.values())


@pytest.mark.parametrize('case', ['base', 'cap2', 'mask'])
def test_losses(case, runs, arrays):
  for name, value in runs[case][2].items():
    np.testing.assert_allclose(value, arrays[f'{case}/{name}'], rtol=0, atol=2e-5, err_msg=name)


def test_gradients(runs, arrays):
  """Ours, written through the rules to Hugging Face's names and axes, are the recorded ones."""
  model, _, _, grads = runs['base']
  flat = tree.flatten(grads)
  seen = set()
  for entry in convert.entries(model.config):
    leaf = np.asarray(flat[entry.ours])
    for i, (name, *_) in enumerate(entry.names):
      ours = entry.to_theirs(leaf[i] if entry.stacked else leaf)
      np.testing.assert_allclose(
          ours, arrays[f'base/grad/{name}'], rtol=0, atol=2e-5, err_msg=name
      )
      seen.add(f'base/grad/{name}')
  assert seen == {k for k in arrays if k.startswith('base/grad/')}
