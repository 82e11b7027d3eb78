"""The health of a router, worked by hand; sums that add up."""

import jax
import numpy as np
import pytest

from moejax.routing import draws as draws_lib
from moejax.routing import estimators, gshard, hashed, metrics, sparsemixer, threshold, topk


def measured(route, *args, valid=None):
  """(sums, means) of the Routing that route(*args) gives, on the host."""

  @jax.jit
  def run(*args):
    total = metrics.sums(route(*args), valid)
    return total, metrics.finish(total)

  return jax.device_get(run(*args))


def normal(*shape):
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def mixer(eps, k=2, **options):
  return lambda z: sparsemixer.route(z, k, eps=eps, **options)


def test_by_hand():
  # Band 0.2 (2 eps = 0.1). Token 0: candidates (0, 1), then 1 alone. Token 1: 2 alone, then
  # (0, 1) is within 0.1 * 1: 1 - 0.95 = 0.05. Token 2: one, then one. Gates of 1: where alone.
  logits = np.array([[[2.0, 1.9, 1.0], [1.0, 0.95, 3.0], [5.0, 2.0, 1.0]]], np.float32)
  _, got = measured(mixer(0.05), logits)
  assert got['candidates'] == pytest.approx((2 + 1 + 1 + 2 + 1 + 1) / 6)
  assert got['gates_of_one'] == pytest.approx(4 / 6)
  assert got['no_router_gradient'] == pytest.approx(1 / 3)
  # Choices (0, 1), (2, 0), (0, 1).
  np.testing.assert_allclose(got['load'], [3 / 6, 2 / 6, 1 / 6], rtol=1e-6)
  share = np.array([3, 2, 1]) / 6
  assert got['load_entropy'] == pytest.approx(-(share * np.log(share)).sum(), rel=1e-6)
  assert got['dropped'] == 0
  p = np.exp(logits[0]) / np.exp(logits[0]).sum(-1, keepdims=True)
  assert got['router_entropy'] == pytest.approx(-(p * np.log(p)).sum(-1).mean(), rel=1e-6)


def test_a_scaled_gate_is_not_one():
  """In the paper's variant the factor is beside the gate; a single candidate still gives 1."""
  logits = np.array([[[9.0, 0.0]]], np.float32)
  draws = draws_lib.Draws(exponential=np.ones((1, 1, 2)), uniform=np.zeros((1, 1)))
  for variant in ('reference', 'paper'):
    route = mixer(0.01, 1, variant=variant, euler_on_argmax=False, draws=draws)
    assert measured(route, logits)[1]['gates_of_one'] == 0  # c = 1/3
  assert measured(mixer(0.01, 1), logits)[1]['gates_of_one'] == 1


def test_dropped_is_what_capacity_drops():
  # Three equal tokens, capacity 2: one of three first choices, one of three second choices.
  logits = np.tile(np.array([2.0, 1.0, 0.0], np.float32), (1, 3, 1))
  total, done = measured(lambda z: topk.route(z, 2, capacity=2), logits)
  assert total['tokens'] == 6 and total['load'].sum() == 4
  assert done['dropped'] == pytest.approx(1 / 3)
  # Experts past a threshold's set, and seconds that the coin left out, were never wanted.
  assert measured(lambda z: threshold.route(z, 0.6), logits)[1]['dropped'] == 0
  coin = draws_lib.Draws(exponential=np.ones((2, 3, 3)), uniform=np.ones((2, 3)))
  total, done = measured(lambda z: gshard.route(z, draws=coin, capacity=2), logits)
  assert total['tokens'] == 3
  assert done['dropped'] == pytest.approx(1 / 3)


def test_padding_is_not_dropped_and_counts_nowhere():
  logits = normal(1, 6, 4)
  valid = np.array([[True] * 4 + [False] * 2])
  total, _ = measured(mixer(0.3, valid_bt=valid), logits, valid=valid.reshape(-1))
  assert total['tokens'] == 8 and total['routed'] == 4 and total['load'].sum() == 8
  want, _ = measured(mixer(0.3), logits[:, :4])
  jax.tree.map(np.testing.assert_array_equal, total, want)


def test_routers_without_a_gradient_and_with_all_of_it():
  logits = normal(1, 9, 4)
  _, got = measured(lambda z: hashed.route(np.arange(9)[None], z), logits)
  assert got['no_router_gradient'] == 1 and got['gates_of_one'] == 1 and got['candidates'] == 1
  _, got = measured(lambda z: topk.route(z, 2), logits)
  assert got['no_router_gradient'] == 0 and got['candidates'] == 4


def test_experts_evaluated_for_their_gradient_are_no_load():
  logits = normal(1, 9, 4)
  dense, sparse = (
      measured(lambda z: estimators.densemixer(z, 2, dense=d), logits)[1] for d in (True, False)
  )
  for name, value in sparse.items():
    np.testing.assert_allclose(dense[name], value, rtol=1e-6, err_msg=name)


def test_sums_of_parts_are_the_sums_of_the_whole():
  logits = normal(4, 8, 5)
  one = jax.jit(lambda z: metrics.sums(mixer(0.3, capacity=3)(z)))
  parts = [jax.device_get(one(logits[i : i + 1])) for i in range(4)]
  whole = jax.device_get(one(logits))
  jax.tree.map(
      lambda want, *got: np.testing.assert_allclose(sum(got), want, rtol=1e-6), whole, *parts
  )
  assert whole['tokens'] - whole['load'].sum() > 0


def test_layers_have_their_own_and_the_mean():
  routes = {'encoder/a': lambda z: topk.route(z, 2), 'decoder/b': mixer(0.01, 1)}

  @jax.jit
  def run(z):
    routings = {path: route(z) for path, route in routes.items()}
    done = metrics.finish_layers({'loss': 3.0, **metrics.layer_sums(routings, {})})
    return done, {path: metrics.finish(metrics.sums(r)) for path, r in routings.items()}

  done, want = jax.device_get(run(normal(1, 8, 4)))
  for name in metrics.NAMES:
    values = [want[path][name] for path in routes]
    assert [done[f'{name}/{path}'] for path in routes] == values
    assert done[name] == pytest.approx(np.mean(values), rel=1e-6)
  extra = {f'{n}/{p}' for n in (*metrics.NAMES, 'load') for p in routes}
  assert set(done) == {'loss', *metrics.NAMES, *extra} and done['loss'] == 3.0
  assert metrics.finish_layers({'loss': 1.0}) == {'loss': 1.0}


def test_finish_of_nothing_is_finite():
  total = {name: np.float32(0) for name in metrics.SUMS} | {'load': np.zeros(3, np.float32)}
  done = jax.device_get(jax.jit(metrics.finish)(total))
  assert all(np.isfinite(x).all() for x in done.values())
