"""The training step: same numbers on every mesh, from every split, and as written in the papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import errors, tree
from moejax.train import state as state_lib
from moejax.train import step as step_lib

MESHES = {'8x1x1': (8, 1, 1), '2x4x1': (2, 4, 1), '2x2x2': (2, 2, 2)}


@pytest.mark.long(but=('2x2x2',))
@pytest.mark.parametrize('name', MESHES)
def test_same_loss_on_every_mesh(common, name):
  one = common.setup(common.experiment(model__dropout_rate=0.2))
  _, want = one.run(one.fresh(), 0, 6)
  data, expert, tensor = MESHES[name]
  made = common.setup(common.experiment(
      mesh__data=data, mesh__expert=expert, mesh__tensor=tensor, model__dropout_rate=0.2
  ))
  assert made.mesh.size == 8
  _, losses = made.run(made.fresh(), 0, 6)
  np.testing.assert_allclose(losses, want, rtol=1e-5)
  assert losses[5] < losses[0]


def test_factored_moments_lie_as_their_parameter(common):
  made = common.setup(common.experiment(
      optim__optimizer='adafactor', model__d_model=128, model__d_ff=256, mesh__data=2,
      mesh__expert=2, mesh__tensor=2,
  ))
  places = state_lib.shardings(state_lib.abstract(made.experiment, made.optimizer), made.mesh)
  specs = {
      '/'.join(str(getattr(k, 'key', getattr(k, 'name', ''))) for k in keys): place.spec
      for keys, place in jax.tree_util.tree_leaves_with_path(places.opt_state)
  }
  wi = lambda moment: next(
      tuple(spec) for path, spec in specs.items()
      if path.endswith(f'{moment}/encoder/layers_0/ffn/experts/wi')
  )
  assert wi('v_row') == ('expert', 'data') and wi('v_col') == ('expert', 'tensor')


def test_parameters_and_moments_are_sharded_over_data_too(common):
  made = common.setup(common.experiment(mesh__data=2, mesh__expert=2, mesh__tensor=2))
  state = made.fresh()
  wi = state.params['encoder']['layers_0']['ffn']['experts']['wi']
  assert wi.addressable_shards[0].data.size == wi.size // 8
  moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == wi.shape]
  assert moments and all(m.sharding == wi.sharding for m in moments)


def test_the_seed_gives_the_same_parameters_on_every_mesh(common):
  made = common.setup(common.experiment(mesh__data=2, mesh__expert=2, mesh__tensor=2))
  state = state_lib.init(made.experiment, made.optimizer, made.mesh)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.params, made.params)


@functools.cache
def _gradients(common, **overrides):
  """Gradients and metrics of one batch, with no load-balancing loss (it is not additive)."""
  config = common.experiment(model__moe__router_aux_loss_coef=0.0, **overrides)
  made = common.setup(config)
  args = made.params, made.batches.batch(0)
  fn = lambda p, b: step_lib.gradients(config, p, b, jax.random.key(0), None)
  return jax.jit(fn)(*args)


@pytest.mark.long
@pytest.mark.parametrize('overrides', [{'train__accumulate': 4}, {'train__remat': True}])
def test_the_gradient_does_not_depend_on_how_it_is_computed(common, overrides):
  want, want_metrics = _gradients(common)
  got, got_metrics = _gradients(common, **overrides)
  for path, leaf in tree.flatten(want).items():
    scale = float(jnp.abs(leaf).max())
    np.testing.assert_allclose(
        tree.flatten(got)[path], leaf, atol=1e-5 * scale + 1e-9, rtol=0, err_msg=path
    )
  for name in ('cross_entropy', 'accuracy', 'z_loss'):
    np.testing.assert_allclose(got_metrics[name], want_metrics[name], rtol=1e-5)


@pytest.mark.long
def test_bfloat16_is_close_and_keeps_float32_parameters(common):
  made, full = (
      common.setup(common.experiment(train__compute_dtype=d)) for d in ('bfloat16', 'float32')
  )
  state, losses = made.run(made.fresh(), 0, 6)
  np.testing.assert_allclose(losses, full.run(full.fresh(), 0, 6)[1], rtol=0.02)
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype('float32')}


def test_loss_is_cross_entropy_plus_weighted_router_losses(common):
  made = common.setup(common.experiment())
  _, metrics = made.step(made.fresh(), made.batch(0))
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


def _routing(common, config, batch):
  params = common.setup(config).params
  fn = lambda p, b: step_lib.routing_metrics(
      config.model, step_lib.forward(config, p, b).routings, b
  )
  return jax.jit(fn)(params, batch)


def test_dropped_share_under_a_small_capacity(common):
  config = common.experiment(model__moe__expert_capacity=2)
  metrics = _routing(common, config, common.make_batches(config).batch(0))
  path = 'encoder/layers_0/ffn'
  kept = float(metrics[f'load/{path}'].sum() / metrics[f'tokens/{path}'])
  assert 0.0 < kept <= 4 * 2 / 32  # at most capacity x experts of each 32 tokens


def test_padding_kept_from_the_experts_is_not_called_dropped(common):
  config = common.experiment(model__moe__router_ignore_padding_tokens=True)
  batch = common.make_batches(config).batch(0)
  batch = {name: np.pad(x, ((0, 0), (0, 8))) for name, x in batch.items()}
  metrics = _routing(common, config, batch)
  assert metrics['load/encoder/layers_0/ffn'].sum() == (batch['encoder_tokens'] != 0).sum()
  for stack in ('encoder', 'decoder'):
    path = f'{stack}/layers_0/ffn'
    assert metrics[f'load/{path}'].sum() == metrics[f'tokens/{path}']


def test_cross_entropy_by_hand():
  logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]]))
  losses, hits = step_lib.cross_entropy(logits, jnp.array([[1, 1]]))
  np.testing.assert_allclose(losses, [[np.log(4.0), -np.log(0.8)]], rtol=1e-6)
  np.testing.assert_array_equal(hits, [[False, True]])


def test_content_weights_leave_out_sentinels_and_eos(common):
  batch = {
      'targets': jnp.array([[common.VOCAB - 1, 7, 9, 1, 0]]),
      'weights': jnp.array([[1.0, 1, 1, 1, 0]]),
  }
  weights = step_lib.content_weights(batch, common.experiment().model, 20)
  np.testing.assert_array_equal(weights, [[0.0, 1, 1, 0, 0]])


def test_padding_changes_no_loss(common):
  config = common.experiment()
  params = common.setup(config).params
  batch = common.make_batches(config).batch(0)
  fn = lambda p, b: step_lib.eval_step(config, p, b, first_sentinel=config.model.vocab_size - 20)
  wider = {name: np.pad(x, ((0, 0), (0, 5))) for name, x in batch.items()}
  want, got = (jax.jit(fn)(params, b) for b in (batch, wider))
  for name in ('loss', 'weight', 'content_loss', 'accuracy'):
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5)


def test_an_odd_batch_names_the_fields(common):
  with pytest.raises(errors.UserError, match=r'train\.batch_size = 12 .*train\.accumulate'):
    common.setup(common.experiment(train__batch_size=12, mesh__data=8))
