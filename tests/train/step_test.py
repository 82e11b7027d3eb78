"""The training step: same numbers on every mesh, from every split, and as written in the papers."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import errors, sharding, tree
from moejax.data import batches
from moejax.train import state as state_lib
from moejax.train import step as step_lib

_SPEC = importlib.util.spec_from_file_location(
    'train_common', pathlib.Path(__file__).with_name('common.py')
)
common = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(common)

MESHES = {'1x1x1': (1, 1, 1), '8x1x1': (8, 1, 1), '2x4x1': (2, 4, 1), '2x2x2': (2, 2, 2)}


@pytest.fixture(scope='module')
def reference_losses():
  made = common.setup(common.experiment())
  return common.run_steps(made, made.state, 0, 6)[1]


@pytest.mark.parametrize('name', [name for name in MESHES if name != '1x1x1'])
def test_same_loss_on_every_mesh(name, reference_losses):
  data, expert, tensor = MESHES[name]
  made = common.setup(
      common.experiment(mesh__data=data, mesh__expert=expert, mesh__tensor=tensor)
  )
  assert made.mesh.size == data * expert * tensor
  _, losses = common.run_steps(made, made.state, 0, 6)
  np.testing.assert_allclose(losses, reference_losses, rtol=1e-5)
  assert losses[5] < losses[0]


def test_parameters_are_sharded_over_data():
  made = common.setup(common.experiment(mesh__data=2, mesh__expert=2, mesh__tensor=2))
  wi = made.state.params['encoder']['layers_0']['ffn']['experts']['wi']
  assert wi.addressable_shards[0].data.size == wi.size // 8
  moments = [x for x in jax.tree.leaves(made.state.opt_state) if x.shape == wi.shape]
  assert moments and all(m.sharding == wi.sharding for m in moments)


def test_the_seed_gives_the_same_parameters_on_every_mesh():
  config = common.experiment(mesh__data=2, mesh__expert=2, mesh__tensor=2)
  made = common.setup(config)
  state = state_lib.init(config.model, made.optimizer, made.mesh, config.train.seed)
  want = common.host_params(config.model, config.train.seed)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.params, want)


def _gradients(config, params, batch):
  key = jax.random.key(0)
  return jax.jit(lambda p, b: step_lib.gradients(config, p, b, key, None))(params, batch)


def test_accumulation_equals_the_big_batch():
  whole = common.experiment(model__moe__router_aux_loss_coef=0.0)
  made = common.setup(whole)
  batch = common.make_batches(whole).batch(0)
  split = common.experiment(model__moe__router_aux_loss_coef=0.0, train__accumulate=4)
  want, want_metrics = _gradients(whole, made.state.params, batch)
  got, got_metrics = _gradients(split, made.state.params, batch)
  for path, leaf in tree.flatten(want).items():
    scale = float(jnp.abs(leaf).max())
    np.testing.assert_allclose(
        tree.flatten(got)[path], leaf, atol=1e-5 * scale + 1e-9, rtol=0, err_msg=path
    )
  for name in ('cross_entropy', 'accuracy', 'z_loss'):
    np.testing.assert_allclose(got_metrics[name], want_metrics[name], rtol=1e-5)


def test_remat_changes_no_gradient():
  plain = common.experiment(model__dropout_rate=0.2)
  made = common.setup(plain)
  batch = common.make_batches(plain).batch(0)
  want, _ = _gradients(plain, made.state.params, batch)
  got, _ = _gradients(
      common.experiment(model__dropout_rate=0.2, train__remat=True), made.state.params, batch
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), want, got)


def test_bfloat16_is_close_and_keeps_float32_parameters():
  made = common.setup(common.experiment(train__compute_dtype='bfloat16'))
  state, losses = common.run_steps(made, made.state, 0, 6)
  full = common.setup(common.experiment())
  _, want = common.run_steps(full, full.state, 0, 6)
  np.testing.assert_allclose(losses, want, rtol=0.02)
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype('float32')}


def test_loss_is_cross_entropy_plus_weighted_router_losses():
  made = common.setup(common.experiment())
  batch = batches.to_global(
      common.make_batches(made.experiment), 0, sharding.batch_sharding(made.mesh)
  )
  _, metrics = made.step(made.state, batch)
  moe = made.experiment.model.moe
  want = (
      metrics['cross_entropy'] + moe.router_aux_loss_coef * metrics['load_balance_loss']
      + moe.router_z_loss_coef * metrics['z_loss']
  )
  np.testing.assert_allclose(metrics['loss'], want, rtol=1e-6)
  assert metrics['load_balance_loss'] >= 2.0 * 0.99  # each layer's is at least about 1
  for path in ('encoder/layers_0/ffn', 'decoder/layers_0/ffn'):
    share = np.asarray(metrics[f'load/{path}'])
    assert share.shape == (4,)
    np.testing.assert_allclose(share.sum(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(
        metrics[f'load_entropy/{path}'], -np.sum(share * np.log(share + 1e-20)), rtol=1e-5
    )
    assert metrics[f'dropped/{path}'] == 0.0


def test_dropped_share_under_a_small_capacity():
  made = common.setup(common.experiment(model__moe__expert_capacity=2))
  batch = batches.to_global(
      common.make_batches(made.experiment), 0, sharding.batch_sharding(made.mesh)
  )
  _, metrics = made.step(made.state, batch)
  kept = 1.0 - float(metrics['dropped/encoder/layers_0/ffn'])
  assert 0.0 < kept <= 4 * 2 / 32 + 1e-6  # at most capacity x experts of each 32 tokens


def test_padding_kept_from_the_experts_is_not_called_dropped():
  config = common.experiment(model__moe__router_ignore_padding_tokens=True)
  made = common.setup(config)
  batch = common.make_batches(config).batch(0)
  batch = {name: np.pad(x, ((0, 0), (0, 8))) for name, x in batch.items()}
  output = step_lib.forward(config, made.state.params, batch)
  metrics = step_lib.routing_metrics(config.model, output.routings, batch)
  assert metrics['load/encoder/layers_0/ffn'].sum() == (batch['encoder_tokens'] != 0).sum()
  for stack in ('encoder', 'decoder'):
    path = f'{stack}/layers_0/ffn'
    assert metrics[f'load/{path}'].sum() == metrics[f'tokens/{path}']


def test_cross_entropy_by_hand():
  logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]]))
  losses, hits = step_lib.cross_entropy(logits, jnp.array([[1, 1]]))
  np.testing.assert_allclose(losses, [[np.log(4.0), -np.log(0.8)]], rtol=1e-6)
  np.testing.assert_array_equal(hits, [[False, True]])


def test_content_weights_leave_out_sentinels_and_eos():
  config = common.experiment().model
  batch = {
      'targets': jnp.array([[VOCAB_TOP, 7, 9, 1, 0]]),
      'weights': jnp.array([[1.0, 1, 1, 1, 0]]),
  }
  np.testing.assert_array_equal(
      step_lib.content_weights(batch, config, 20), [[0.0, 1, 1, 0, 0]]
  )


VOCAB_TOP = common.VOCAB - 1


def test_padding_changes_no_loss():
  config = common.experiment()
  made = common.setup(config)
  batch = common.make_batches(config).batch(0)
  evaluate = lambda b: jax.jit(lambda p: step_lib.eval_step(config, p, b))(made.state.params)
  want = evaluate(batch)
  wider = {
      name: np.pad(x, ((0, 0), (0, 5)))
      for name, x in batch.items()
  }
  got = evaluate(wider)
  for name in ('loss', 'weight', 'content_loss', 'accuracy'):
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5)


def test_an_odd_batch_names_the_fields():
  with pytest.raises(errors.UserError, match=r'train\.batch_size = 12 .*train\.accumulate'):
    common.setup(common.experiment(train__batch_size=12, mesh__data=8))
