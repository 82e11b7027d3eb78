"""Routers trained on what experts do: recorded steps, and what training must and must not do."""

from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.compress import chooser_core, router_training
from moejax.errors import UserError
from moejax.routing import choice

VECTORS = Path(__file__).parents[1] / 'vectors' / 'moefication'


@pytest.fixture(scope='module')
def recorded():
  z = np.load(VECTORS / 'mlp_router_sparse_E16.npz')
  return {name: z[name] for name in z.files}


@pytest.fixture(scope='module')
def layer():
  z = np.load(VECTORS / 'fixture_sparse.npz')
  return {'wi': z['W1'].T, 'wo': z['W2'].T, 'x': z['X']}


def test_the_start_is_the_published_one(recorded, layer):
  start = router_training.initial_mlp(chooser_core.centres(layer['wi'], recorded['labels']))
  np.testing.assert_allclose(start['kernel'].T, recorded['init_w0'], atol=1e-6)
  np.testing.assert_array_equal(start['out'].T, recorded['init_w2'])
  square = router_training.initial_mlp(np.full((3, 3), 2.0))
  np.testing.assert_array_equal(square['out'], np.eye(3))


def test_six_steps_of_adam(recorded, layer):
  params = router_training.initial_mlp(chooser_core.centres(layer['wi'], recorded['labels']))
  state = router_training.initial_state(params)
  for i, (start, stop) in enumerate(recorded['adam_batches']):
    index = np.full((1, 512), -1, np.int32)
    index[0, : stop - start] = np.arange(start, stop)
    params, state, losses = router_training.run_epoch(
        params, state, layer['x'], recorded['scores'], index, None, 0.01, kind='mlp'
    )
    assert float(losses[0]) == pytest.approx(recorded['adam_losses'][i], abs=1e-6)
    np.testing.assert_allclose(params['kernel'].T, recorded['adam_w0'][i], atol=2e-5)
    np.testing.assert_allclose(params['out'].T, recorded['adam_w2'][i], atol=2e-5)


def test_target_of_a_batch(recorded):
  mass = recorded['scores'][:512]
  np.testing.assert_allclose(
      router_training.targets(mass), recorded['batch0_target'], atol=1e-6
  )
  np.testing.assert_allclose(router_training.targets(mass, 4.0), mass / 4, rtol=1e-6)
  np.testing.assert_array_equal(router_training.targets(mass * 0), 0)


def test_a_fixed_order_trains_as_recorded(recorded, layer):
  batches = [np.arange(start, stop) for start, stop in recorded['adam_batches']]
  start = router_training.initial_mlp(chooser_core.centres(layer['wi'], recorded['labels']))
  got = router_training.train_mlp(
      start, layer['x'], recorded['scores'], 3, scale='batch', epochs=1, batches=batches
  )
  np.testing.assert_allclose(got.losses, recorded['adam_losses'][None], atol=1e-6)
  assert got.validation[0] == pytest.approx(recorded['recall_init'], abs=1e-4)


@pytest.mark.parametrize('scale', router_training.SCALES)
def test_training_recalls_what_the_published_code_does(recorded, layer, scale):
  start = router_training.initial_mlp(chooser_core.centres(layer['wi'], recorded['labels']))
  train = lambda seed: router_training.train_mlp(
      start, layer['x'], recorded['scores'], 3, scale=scale, seed=seed
  )
  got = train(0)
  assert got.losses.shape == (30, 2) and got.validation.shape == (31,)
  assert got.losses[-1].mean() < got.losses[0].mean()
  assert got.validation[got.kept] == got.validation.max()
  held = slice(*recorded['eval_rows'])
  y = choice.scores(got.params, layer['x'][held], 'mlp')
  recall = chooser_core.mass_recall(y, recorded['scores'][held], 3)
  assert recall == pytest.approx(got.validation.max(), abs=1e-6)
  assert recall >= recorded['recall_ref_final'] - 0.002
  again, other = train(0), train(1)
  np.testing.assert_array_equal(again.losses, got.losses)
  for name, a in got.params.items():
    np.testing.assert_array_equal(again.params[name], a)
  assert (other.losses != got.losses).any()


def test_training_learns_what_the_start_does_not_know(recorded, layer):
  rng = np.random.default_rng(0)
  start = router_training.initial_mlp(rng.standard_normal((16, 32)) / 6)
  got = router_training.train_mlp(start, layer['x'], recorded['scores'], 3, batch=32)
  assert got.validation[0] < 0.5 and got.validation.max() > 0.9 and got.kept > 0


def test_one_scale_does_not_depend_on_the_batch(recorded, layer):
  start = router_training.initial_mlp(chooser_core.centres(layer['wi'], recorded['labels']))
  run = lambda scale, rows: router_training.train_mlp(
      start, layer['x'], recorded['scores'], 3, scale=scale, epochs=1, batches=[rows]
  ).losses[0, 0]
  token, best = np.array([7]), np.unravel_index(recorded['scores'][:900].argmax(), (900, 16))[0]
  pair, other = np.array([7, best]), np.array([best])
  mean = lambda scale: (run(scale, token) + run(scale, other)) / 2
  assert run('all', pair) == pytest.approx(mean('all'), abs=1e-6)
  assert abs(run('batch', pair) - mean('batch')) > 1e-4


def test_zero_tokens_in_value_are_no_obstacle(recorded, layer):
  x, mass = layer['x'].copy(), recorded['scores'].copy()
  x[:300], mass[:600] = 0, 0
  start = router_training.initial_mlp(chooser_core.centres(layer['wi'], recorded['labels']))
  for scale in router_training.SCALES:
    rows = [np.arange(300), np.arange(300, 600), np.arange(900)]
    got = router_training.train_mlp(start, x, mass, 3, scale=scale, epochs=2, batches=rows)
    assert np.isfinite(got.losses).all() and np.isfinite(got.validation).all()
    assert all(np.isfinite(a).all() for a in got.params.values())
    still = router_training.train_mlp(start, x, 0 * mass, 3, scale=scale, epochs=1)
    assert np.isfinite(still.losses).all() and still.kept == 0


def test_the_best_epoch_is_kept_and_the_start_where_none_is(recorded, layer):
  params = {'kernel': recorded['refrun_final_w0'].T, 'out': recorded['refrun_final_w2'].T}
  got = router_training.train_mlp(params, layer['x'], recorded['scores'], 3, rate=3.0, epochs=2)
  assert got.kept == 0 and got.validation[1:].max() < got.validation[0]
  np.testing.assert_array_equal(got.params['kernel'], params['kernel'])


def test_few_tokens_train_and_validate(recorded, layer):
  start = router_training.initial_mlp(chooser_core.centres(layer['wi'], recorded['labels']))
  for tokens in (1, 11):
    got = router_training.train_mlp(
        start, layer['x'][:tokens], recorded['scores'][:tokens], 3, epochs=1
    )
    assert np.isfinite(got.losses).all()


def test_what_cannot_be_trained_on(recorded, layer):
  start = router_training.initial_mlp(chooser_core.centres(layer['wi'], recorded['labels']))
  x, mass = layer['x'], recorded['scores']
  bad = x.copy()
  bad[3, 4] = np.nan
  for args, message in (
      ((x[:0], mass[:0], 3), 'no tokens to train a router on'),
      ((x[:5], mass[:4], 3), 'inputs of 5 tokens and targets of 4 do not match'),
      ((bad, mass, 3), 'inputs of the router are not finite in 1 places'),
      ((x, mass, 17), 'k = 17 of 16 experts'),
  ):
    with pytest.raises(UserError, match=message):
      router_training.train_mlp(start, *args)
  with pytest.raises(UserError, match='no tokens to train a router on'):
    router_training.train_norm(router_training.initial_norm(32, 8, 16), x[:0], mass[:0])
  with pytest.raises(UserError, match="scale = 'batches'.*did you mean 'batch'"):
    router_training.train_mlp(start, x, mass, 3, scale='batches')


@pytest.mark.parametrize('size', [1e-3, 1e3])
def test_norms_of_any_size_are_learnt(layer, size):
  labels = np.load(VECTORS / 'derived_sparse_E16.npz')['labels']
  hidden = np.maximum(layer['x'] @ layer['wi'], 0)
  norms = size * np.asarray(chooser_core.output_norms(hidden, layer['wo'], labels))
  start = router_training.initial_norm(32, 64, 16)
  got = router_training.train_norm(start, layer['x'], norms, epochs=60, batch=64)
  y = np.asarray(jax.jit(choice.scores, static_argnames='kind')(got.params, layer['x'], 'norm'))
  error = np.square(y[900:] - norms[900:]).mean() / np.square(norms[900:]).mean()
  assert error == pytest.approx(got.validation[got.kept], rel=1e-3)
  assert got.validation[got.kept] == got.validation.min() < 0.1 < 0.5 < got.validation[0]
  assert chooser_core.mass_recall(y[900:], norms[900:], 3) > 0.85
