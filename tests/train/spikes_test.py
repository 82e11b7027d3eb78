"""Steps that go wrong end the run before a checkpoint holds them, or are left out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.train import loop, spikes


def test_bad_steps_by_hand():
  recent = spikes.no_losses()
  assert not spikes.is_bad(jnp.float32(50), jnp.float32(1), recent, 2.0)  # nothing to compare with
  assert spikes.is_bad(jnp.float32(np.nan), jnp.float32(1), recent, 2.0)
  assert spikes.is_bad(jnp.float32(1), jnp.float32(np.inf), recent, 0.0)
  for i in range(spikes.WINDOW):
    recent = spikes.remember(recent, jnp.float32(3 + i % 2), jnp.bool_(False))
  assert not spikes.is_bad(jnp.float32(5.4), jnp.float32(1), recent, 2.0)
  assert spikes.is_bad(jnp.float32(5.6), jnp.float32(1), recent, 2.0)
  assert not spikes.is_bad(jnp.float32(5.6), jnp.float32(1), recent, 0.0)
  same = spikes.remember(recent, jnp.float32(99), jnp.bool_(True))
  np.testing.assert_array_equal(same, recent)


@pytest.mark.parametrize('action', spikes.ACTIONS)
def test_a_step_that_is_skipped_changes_nothing_but_the_counter(common, action):
  made = common.setup(common.experiment(train__on_spike=action))
  low = np.zeros(spikes.WINDOW, np.float32)
  state = dataclasses.replace(made.fresh(), recent_losses=jnp.array(low))
  before = jax.tree.map(np.array, (state.params, state.opt_state))  # the step takes the buffers
  new, metrics = made.step(state, made.batch(0))
  assert metrics['bad_steps'] == 1 and metrics['cross_entropy'] > 2 and new.step == 1
  after = jax.device_get((new.params, new.opt_state))
  same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after))]
  assert all(same) == (action == 'skip')
  np.testing.assert_array_equal(new.recent_losses, low)


def metrics(bad, loss=9.0):
  return {'bad_steps': float(bad), 'cross_entropy': loss, 'grad_norm': 1.0}


def test_the_watch_is_two_steps_late_and_settles():
  watch = spikes.Watch('stop', 2.0)
  watch.add(1, metrics(True))
  watch.add(2, metrics(False))
  with pytest.raises(UserError, match=r'step 1: loss 9, .* over the median of the last 32; lower'):
    watch.add(3, metrics(False))
  watch = spikes.Watch('stop', 2.0)
  watch.add(7, metrics(True, float('nan')))
  with pytest.raises(UserError, match='step 7: loss nan, gradient norm 1; lower optim'):
    watch.settle()


def test_a_run_that_only_skips_ends():
  watch = spikes.Watch('skip', 2.0)
  for i in range(spikes.WINDOW - 1):
    watch.add(i, metrics(True))
  watch.settle()
  watch.add(40, metrics(False))
  with pytest.raises(UserError, match='32 steps in a row were skipped'):
    for i in range(100):
      watch.add(50 + i, metrics(True))


@pytest.mark.long
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(common, tmp_path):
  (tmp_path / 'text.txt').write_text('we the people of the united states ' * 60)
  settings = dict(
      data__train_files=[str(tmp_path / 'text.txt')], train__batch_size=4, train__steps=20,
      train__checkpoint_every=20,
  )
  loop.run(common.experiment(**settings), tmp_path / 'run', hooks=[])
  wild = common.experiment(**{
      **settings, 'train__steps': 60, 'optim__learning_rate': 1e3, 'optim__clip_norm': 0.0,
      'train__checkpoint_every': 30,
  })
  with pytest.raises(UserError, match=r'step (2\d|30): loss .*it goes on from the last checkpoint'):
    loop.run(wild, tmp_path / 'run', hooks=[])
  kept = [p.name for p in (tmp_path / 'run' / 'checkpoints').glob('*')]
  assert kept == ['00000020']
  calm = common.experiment(**{**settings, 'train__steps': 24})
  assert loop.run(calm, tmp_path / 'run', hooks=[])['step'] == 24
