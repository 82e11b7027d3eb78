"""The loss that makes activations sparse: its numbers, its ramp, and that it works."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config as config_lib
from moejax import model as model_lib
from moejax.config import ActivityConfig
from moejax.errors import UserError
from moejax.nn import stacking
from moejax.ops import activity as measured
from moejax.train import activity, loop, optim
from moejax.train import state as state_lib
from moejax.train import step as step_lib

pytestmark = pytest.mark.once

CONFIG = config_lib.DecoderConfig(
    family='llama', vocab_size=61, d_model=16, d_head=8, d_ff=32, num_heads=2, num_kv_heads=2,
    num_layers=2, initializer_std=0.3, eos_ids=(1,), activation='relu', max_positions=64,
)


def batch(rows=4, length=16, seed=0):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(2, 61, (rows, length)).astype(np.int32)
  segments = np.ones((rows, length), np.int32)
  segments[-1, 5:] = 0
  return {
      'tokens': tokens, 'targets': np.roll(tokens, -1, 1), 'segments': segments,
      'positions': np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
      'weights': (segments > 0).astype(np.float32),
  }


def test_measures_are_those_of_loops():
  rng = np.random.default_rng(0)
  hidden = np.maximum(rng.normal(size=(2, 5, 8)), 0).astype(np.float32)
  hidden[0, 1] = 0
  inputs = (rng.normal(size=(2, 5, 8)) * 12).astype(np.float32)
  valid = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
  got = measured.measure(jnp.asarray(hidden), jnp.asarray(inputs), jnp.asarray(valid))
  rows, before = hidden[valid], inputs[valid]
  index = [(r.sum() ** 2 / (r @ r) if r.any() else 0.0) for r in rows]
  assert float(got.active) == pytest.approx((rows > 0).mean(), rel=1e-6)
  assert float(got.l1) == pytest.approx(rows.mean(), rel=1e-6)
  assert float(got.hoyer) == pytest.approx(np.mean(index) / 8, rel=1e-5)
  assert float(got.above) == pytest.approx(np.maximum(before + 10, 0).mean(), rel=1e-6)
  grads = jax.grad(lambda h: measured.measure(h, h, None).hoyer)(jnp.asarray(hidden * 1e-25))
  assert np.isfinite(np.asarray(grads)).all()


def test_the_gradient_of_the_index_is_that_of_its_formula():
  h = jnp.asarray(np.random.default_rng(1).uniform(0.1, 1, (1, 3, 6)), jnp.float32)
  plain = lambda h: jnp.mean(jnp.square(h.sum(-1)) / jnp.square(h).sum(-1)) / 6
  np.testing.assert_allclose(
      jax.grad(lambda h: measured.measure(h, h, None).hoyer)(h), jax.grad(plain)(h), rtol=1e-4,
      atol=1e-6,
  )


def test_stages():
  config = ActivityConfig(form='l1', weights=(1.0, 3.0, 2.0), stages=(10, 20, 4))
  at = lambda step: float(activity.weight(config, step))
  assert at(0) == at(10) == 1
  assert at(20) == pytest.approx(2)
  assert at(15) == pytest.approx(1 + (1 - np.cos(np.pi / 4)))
  assert at(30) == pytest.approx(3) and at(32) == pytest.approx(2.5) and at(1000) == 2
  assert float(activity.weight(ActivityConfig(form='l1', weights=(0.5,)), 7)) == 0.5


@pytest.mark.parametrize('stacked', [False, True])
def test_a_model_tells_the_activity_of_its_real_tokens(stacked):
  params = model_lib.init_params(CONFIG, jax.random.key(0))
  own = stacking.stack(params, CONFIG) if stacked else params
  plain = model_lib.forward(CONFIG, own, batch())
  seen = model_lib.forward(CONFIG, own, batch(), observe=True)
  assert plain.activity is None and list(seen.activity) == [
      'decoder/layers_0/ffn', 'decoder/layers_1/ffn']
  np.testing.assert_array_equal(plain.logits_btv, seen.logits_btv)
  other = batch()
  other['tokens'][-1, 5:] = 7
  again = model_lib.forward(CONFIG, own, other, observe=True)
  for path, a in seen.activity.items():
    assert 0.2 < float(a.active) < 0.8
    np.testing.assert_allclose(float(a.l1), float(again.activity[path].l1), rtol=1e-6)


@pytest.mark.long(but=('1-l1',))
@pytest.mark.parametrize('form', ['l1', 'hoyer', 'above'])
@pytest.mark.parametrize('accumulate', [1, 2])
def test_training_pushes_activity_down(form, accumulate):
  config = dataclasses.replace(CONFIG, activation='silu' if form == 'above' else 'relu')
  weight, rate = {'l1': (3.0, 3e-3), 'hoyer': (10.0, 3e-3), 'above': (1.0, 2e-2)}[form]
  histories = []
  for pushed in (True, False):
    experiment = config_lib.Experiment(
        model=config,
        optim=config_lib.OptimConfig(learning_rate=rate, warmup_steps=0, schedule='constant'),
        activity=ActivityConfig(form=form, weights=(weight if pushed else 0.0,)),
        train=config_lib.TrainConfig(batch_size=4, accumulate=accumulate),
    )
    optimizer = optim.make_optimizer(
        experiment.optim, 40, state_lib.abstract_params(experiment)
    )
    params = model_lib.init_params(config, jax.random.key(1))
    state = state_lib.TrainState(
        step=jnp.int32(0), params=params, opt_state=optimizer.init(params),
        recent_losses=jnp.full((16,), jnp.nan),
    )
    step = jax.jit(lambda s, b, e=experiment, o=optimizer: step_lib.train_step(e, o, s, b))
    history = []
    for i in range(40):
      state, metrics = step(state, batch(seed=i % 4))
      history.append({k: float(v) for k, v in metrics.items() if not np.ndim(v)})
    histories.append(history)
  pushed, plain = histories
  assert pushed[-1]['activity'] < 0.8 * plain[-1]['activity']
  assert pushed[0]['loss'] == pytest.approx(
      pushed[0]['cross_entropy'] + weight * pushed[0]['activity'], rel=1e-5)
  assert pushed[-1]['cross_entropy'] < pushed[0]['cross_entropy']
  if form != 'above':
    assert pushed[-1]['active_units'] < plain[-1]['active_units']


def test_bad_settings():
  with pytest.raises(UserError, match='activity.form'):
    ActivityConfig(form='l2')
  with pytest.raises(UserError, match='activity.stages.*one for each of 2'):
    ActivityConfig(form='l1', weights=(0.1, 0.2))
  with pytest.raises(UserError, match='activity.weights'):
    ActivityConfig(form='l1', weights=(-1.0,))
  sparse = dataclasses.replace(CONFIG, moe=config_lib.DecoderMoeConfig(num_experts=4))
  with pytest.raises(UserError, match='no dense FFN'):
    loop.check(config_lib.Experiment(model=sparse, activity=ActivityConfig(form='l1')))
