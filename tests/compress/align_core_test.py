"""Alignment leaves what an expert computes as it is, and finds units that were shuffled."""

import numpy as np
import pytest

from moejax.compress import align_core, merge_core
from moejax.ops import ffn

ACTIVATIONS = {'relu': (), 'gelu': ('biases',), 'silu': ('gate',), 'gelu_new': ('gate', 'biases')}


def experts(kind, count=3, d=6, f=10, seed=0):
  rng = np.random.default_rng(seed)
  names = ['wi', 'gate'] if 'gate' in kind else ['wi']
  out = {name: rng.normal(size=(count, d, f)).astype(np.float32) for name in names}
  out['wo'] = rng.normal(size=(count, f, d)).astype(np.float32)
  if 'biases' in kind:
    out |= {f'{n}_bias': rng.normal(size=(count, f)).astype(np.float32) for n in names}
    out['wo_bias'] = rng.normal(size=(count, d)).astype(np.float32)
  return out


def shuffled(stack, seed=1):
  """Every expert becomes expert 0 with its hidden units in another order."""
  rng = np.random.default_rng(seed)
  one = {name: w[0] for name, w in stack.items()}
  orders = [np.arange(stack['wo'].shape[1])]
  orders += [rng.permutation(orders[0]) for _ in range(len(stack['wo']) - 1)]
  made = [align_core.permute(one, order) for order in orders]
  return {name: np.stack([m[name] for m in made]) for name in stack}, orders


def run(stack, e, x, activation):
  return np.asarray(ffn.dense_ffn({n: w[e] for n, w in stack.items()}, x, activation))


@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_outputs_stay_and_profit_grows(activation):
  stack = experts(ACTIVATIONS[activation])
  moved, orders = align_core.in_one_order(stack, 0)
  x = np.random.default_rng(2).normal(size=(7, 6)).astype(np.float32)
  for e in range(3):
    np.testing.assert_allclose(
        run(moved, e, x, activation), run(stack, e, x, activation), rtol=1e-5, atol=1e-5
    )
    first, before, after = (
        {n: w[i] for n, w in s.items()} for s, i in ((stack, 0), (stack, e), (moved, e))
    )
    before, after = (np.trace(align_core.profit(first, one)) for one in (before, after))
    assert after >= before - 1e-4
  assert orders[0].tolist() == list(range(10)) and orders[1].tolist() != list(range(10))


@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_copies_in_other_orders_merge_to_the_original(activation):
  stack, orders = shuffled(experts(ACTIVATIONS[activation]))
  moved, found = align_core.in_one_order(stack, 0)
  for order, back in zip(orders, found):
    np.testing.assert_array_equal(order[back], np.arange(10))
  merged = merge_core.weighted(moved, np.zeros(3, np.int32), np.array([0.5, 0.3, 0.2]))
  for name, w in stack.items():
    np.testing.assert_allclose(merged[name][0], w[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_activations_find_the_same_order(activation):
  stack, orders = shuffled(experts(ACTIVATIONS[activation]))
  x = np.random.default_rng(3).normal(size=(200, 6)).astype(np.float32)
  hidden = [
      align_core.hidden_units({n: w[e] for n, w in stack.items()}, x, activation) for e in range(2)
  ]
  order = align_core.match(align_core.correlation(*hidden))
  np.testing.assert_array_equal(orders[1][order], np.arange(10))


@pytest.mark.parametrize('kind', [(), ('gate',)])
def test_every_expert_its_own_group_changes_nothing(kind):
  stack = experts(kind)
  merged = merge_core.weighted(stack, np.arange(3), np.array([0.5, 0.0, 0.5]))
  for name, w in stack.items():
    np.testing.assert_allclose(merged[name], w, rtol=1e-6, atol=1e-6)


def test_least_squares_comes_nearer_to_the_outputs_than_the_average():
  stack = experts(('gate',), count=2)
  mean = {n: w[0] for n, w in merge_core.weighted(stack, np.zeros(2, int), np.ones(2)).items()}
  x = np.random.default_rng(4).normal(size=(60, 6)).astype(np.float32)
  want = np.concatenate([run(stack, e, x[30 * e : 30 * e + 30], 'silu') for e in range(2)])
  hidden = align_core.hidden_units(mean, x, 'silu')
  wo = merge_core.solve_wo(hidden, want, mean['wo'])
  error = lambda w: np.linalg.norm(np.asarray(hidden) @ np.asarray(w) - want)
  assert error(wo) < 0.9 * error(mean['wo'])
  best = np.linalg.lstsq(np.asarray(hidden, np.float64), want, rcond=None)[0]
  assert error(wo) < 1.05 * error(best)
  unused = merge_core.solve_wo(np.zeros((5, 10)), np.zeros((5, 6)), mean['wo'])
  np.testing.assert_allclose(unused, mean['wo'], rtol=1e-6)


def test_zipping_copies_gives_the_original_units():
  """Where units are orthogonal and alike in norm: inner products also join large ones."""
  units = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 10)))[0].astype(np.float32)
  stack, _ = shuffled({'wi': np.stack([units[:6]] * 2), 'wo': np.stack([units[6:].T] * 2)})
  made = merge_core.zip_units(stack, [0.5, 0.5])
  order = align_core.match(align_core.profit({n: w[0] for n, w in stack.items()}, made))
  for name, w in align_core.permute(made, order).items():
    np.testing.assert_allclose(w, stack[name][0], rtol=1e-4, atol=1e-5)
