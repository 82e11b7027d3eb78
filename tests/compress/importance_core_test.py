"""MoEBERT's importance, dealing and token table, against recorded values and the plain rules."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.compress import importance_core
from moejax.errors import UserError

FOLDER = Path(__file__).parents[1] / 'vectors' / 'moefication'


@pytest.fixture(scope='module')
def recorded():
  fixture = dict(np.load(FOLDER / 'fixture_sparse.npz'))
  data = dict(np.load(FOLDER / 'moebert_sparse.npz'))
  ffn = {'wi': fixture['W1'].T, 'wo': fixture['W2'].T,
         'wi_bias': fixture['b1'], 'wo_bias': fixture['b2']}
  return data, ffn


def loss_of(classes):
  def loss(ffn, sample):
    x, y = sample
    hidden = x @ ffn['wi'] + ffn['wi_bias'][None]
    hidden = jax.nn.silu(x @ ffn['gate']) * hidden if 'gate' in ffn else jax.nn.relu(hidden)
    pooled = (x + hidden @ ffn['wo'] + ffn['wo_bias'][None]).mean(0)
    return -jax.nn.log_softmax(pooled @ classes.T)[y]

  return loss


def by_weight_gradients(loss, ffn, samples):
  """The rule itself: each sample's gradients of the weights, and their products."""
  total, gradient_of = 0, jax.jit(jax.grad(loss))
  for sample in zip(*samples):
    gradient = gradient_of({k: jnp.asarray(v) for k, v in ffn.items()}, sample)
    one = sum((ffn[k] * gradient[k]).sum(0) for k in ('wi', 'gate') if k in ffn)
    total += np.abs(one + (ffn['wo'] * gradient['wo']).sum(1))
  return np.asarray(total)


def test_recorded_importance_and_order(recorded):
  data, ffn = recorded
  loss = loss_of(data['Wc'])
  np.testing.assert_allclose(loss(ffn, (data['x'][0], data['y'][0])), data['loss'][0], rtol=1e-5)
  found = importance_core.importance(loss, ffn, (data['x'], data['y']))
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, data['importance'], rtol=1e-4)
  order = importance_core.by_importance(found)
  assert order.dtype == np.int32
  np.testing.assert_array_equal(order, data['order'])
  np.testing.assert_array_equal(importance_core.by_importance(np.array([1, 3, 3])), [1, 2, 0])


def test_batches_and_blocks_add_up(recorded):
  data, ffn = recorded
  loss, x, y = loss_of(data['Wc']), data['x'], data['y']
  parts = [importance_core.importance(loss, ffn, (x[a:b], y[a:b]), batch=5)
           for a, b in ((0, 7), (7, 24))]
  np.testing.assert_allclose(sum(parts), data['importance'], rtol=1e-4)


def test_a_gate_counts_and_a_dead_neuron_does_not():
  rng = np.random.default_rng(0)
  shapes = {'wi': (6, 10), 'gate': (6, 10), 'wo': (10, 6), 'wi_bias': (10,), 'wo_bias': (6,)}
  ffn = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  ffn['wo'][3] = 0
  samples = rng.normal(size=(4, 5, 6)).astype(np.float32), np.array([0, 1, 2, 0])
  loss = loss_of(rng.normal(size=(3, 6)).astype(np.float32))
  found = importance_core.importance(loss, ffn, samples)
  np.testing.assert_allclose(found, by_weight_gradients(loss, ffn, samples), rtol=1e-4, atol=1e-6)
  assert found[3] == 0 and (np.delete(found, 3) > 0).all()
  without = {name: w for name, w in ffn.items() if name != 'gate'}
  expected = by_weight_gradients(loss, without, samples)
  np.testing.assert_allclose(
      importance_core.importance(loss, without, samples), expected, rtol=1e-4, atol=1e-6
  )


def test_recorded_deal(recorded):
  data, _ = recorded
  found = importance_core.deal(data['order'], 4, int(data['share']), 32)
  assert found.dtype == np.int32
  np.testing.assert_array_equal(found, data['expert_index'])


def test_a_deal_that_shares_nothing_or_all():
  order = np.array([5, 0, 4, 2, 1, 3])
  np.testing.assert_array_equal(importance_core.deal(order, 2, 0, 3), [[5, 4, 1], [0, 2, 3]])
  np.testing.assert_array_equal(importance_core.deal(order, 2, 3, 3), [[5, 0, 4], [5, 0, 4]])


def test_recorded_token_table(recorded):
  data, _ = recorded
  frequencies, expected = data['hash_freq'], data['hash_balance_list']
  table = importance_core.hash_balanced(frequencies, 4)
  assert table.dtype == np.int32
  loads = np.bincount(table[table >= 0], frequencies[table >= 0], minlength=4)
  np.testing.assert_array_equal(loads, data['hash_bucket_totals'])
  # Tokens of one frequency may change places: the recorded sort was not stable.
  for frequency in np.unique(frequencies):
    same = frequencies == frequency
    np.testing.assert_array_equal(np.sort(table[same]), np.sort(expected[same]))


def test_token_table_ties_and_unseen_tokens():
  np.testing.assert_array_equal(
      importance_core.hash_balanced(np.array([2, 0, 2, 3, 1]), 2), [1, -1, 1, 0, 0]
  )
  np.testing.assert_array_equal(importance_core.hash_balanced(np.zeros(3), 2), [-1, -1, -1])


def test_recorded_divergence(recorded):
  data, _ = recorded
  found = importance_core.symmetric_kl(data['kl_p'], data['kl_q'])
  assert found.shape == (5,)
  np.testing.assert_allclose(found.sum(), data['symmetric_kl_sum'], rtol=1e-5)
  even, one, other = np.array([[0.5, 0.5]]), np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
  np.testing.assert_array_equal(importance_core.symmetric_kl(even, even), [0])
  assert np.isfinite(importance_core.symmetric_kl(one, other)).all()


def test_what_cannot_be_done(recorded):
  data, ffn = recorded
  loss, x, y = loss_of(data['Wc']), data['x'], data['y']
  score, deal = importance_core.importance, importance_core.deal
  cases = [
      ('samples of counts', lambda: score(loss, ffn, (x[:0], y[:0]))),
      ('samples of counts', lambda: score(loss, ffn, (x[:2], y[:3]))),
      ('gradient of the loss holds NaN', lambda: score(loss, ffn, (x[:1] * np.nan, y[:1]))),
      ('importance is NaN', lambda: importance_core.by_importance(np.array([1, np.nan]))),
      ('6 neurons do not make 2 experts of 4', lambda: deal(np.arange(6), 2, 1, 4)),
      ('share 3', lambda: deal(np.arange(6), 2, 3, 2)),
      ('0 experts', lambda: importance_core.hash_balanced(np.ones(3), 0)),
      ('frequency', lambda: importance_core.hash_balanced(np.array([1, -1]), 2)),
      ('frequency', lambda: importance_core.hash_balanced(np.array([1, np.nan]), 2)),
  ]
  for message, call in cases:
    with pytest.raises(UserError, match=message) as error:
      call()
    assert '\n' not in str(error.value)
