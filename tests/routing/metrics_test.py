"""The health of a router, worked by hand; sums that add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import draws as draws_lib
from moejax.routing import estimators, gshard, hashed, metrics, sparsemixer, threshold, topk

mixer = jax.jit(
    sparsemixer.route, static_argnums=1,
    static_argnames=('version', 'eps', 'variant', 'euler_on_argmax', 'capacity'),
)
top_k = jax.jit(topk.route, static_argnums=1, static_argnames='capacity')
sums_of = jax.jit(metrics.sums)


def finished(routing, valid=None):
  return jax.device_get(jax.jit(metrics.finish)(sums_of(routing, valid)))


def test_by_hand():
  # Band 0.2 (2 eps = 0.1). Token 0: candidates (0, 1), then 1 alone. Token 1: 2 alone, then
  # (0, 1) is within 0.1 * 1: 1 - 0.95 = 0.05. Token 2: one, then one. Gates of 1: where alone.
  logits = jnp.array([[[2.0, 1.9, 1.0], [1.0, 0.95, 3.0], [5.0, 2.0, 1.0]]])
  got = finished(mixer(logits, 2, eps=0.05))
  assert got['candidates'] == pytest.approx((2 + 1 + 1 + 2 + 1 + 1) / 6)
  assert got['gates_of_one'] == pytest.approx(4 / 6)
  assert got['no_router_gradient'] == pytest.approx(1 / 3)
  # Choices (0, 1), (2, 0), (0, 1).
  np.testing.assert_allclose(got['load'], [3 / 6, 2 / 6, 1 / 6], rtol=1e-6)
  share = np.array([3, 2, 1]) / 6
  assert got['load_entropy'] == pytest.approx(-(share * np.log(share)).sum(), rel=1e-6)
  assert got['dropped'] == 0


def test_a_scaled_gate_is_not_one():
  """In the paper's variant the factor is beside the gate; a single candidate still gives 1."""
  logits = jnp.array([[[9.0, 0.0]]])
  route = lambda eps, variant: mixer(
      logits, 1, eps=eps, variant=variant, euler_on_argmax=False,
      draws=draws_lib.Draws(exponential=jnp.ones((1, 1, 2)), uniform=jnp.zeros((1, 1))),
  )
  for variant in ('reference', 'paper'):
    assert finished(route(0.01, variant))['gates_of_one'] == 0  # c = 1/3
  assert finished(mixer(logits, 1, eps=0.01))['gates_of_one'] == 1


def test_dropped_is_what_capacity_drops():
  # Three equal tokens, capacity 2: one of three first choices, one of three second choices.
  logits = jnp.tile(jnp.array([[[2.0, 1.0, 0.0]]]), (1, 3, 1))
  assert finished(top_k(logits, 2, capacity=2))['dropped'] == pytest.approx(1 / 3)
  got = sums_of(top_k(logits, 2, capacity=2))
  assert got['tokens'] == 6 and got['load'].sum() == 4
  # Experts past a threshold's set, and seconds that the coin left out, were never wanted.
  assert finished(jax.jit(threshold.route)(logits, 0.6))['dropped'] == 0
  coin = draws_lib.Draws(exponential=jnp.ones((2, 3, 3)), uniform=jnp.ones((2, 3)))
  routing = jax.jit(lambda z: gshard.route(z, draws=coin, capacity=2))(logits)
  assert sums_of(routing)['tokens'] == 3
  assert finished(routing)['dropped'] == pytest.approx(1 / 3)


def test_padding_is_not_dropped_and_counts_nowhere():
  logits = jax.random.normal(jax.random.key(0), (2, 6, 4))
  valid = jnp.array([[True] * 4 + [False] * 2, [True] * 6])
  routing = mixer(logits, 2, eps=0.3, valid_bt=valid)
  total = sums_of(routing, valid.reshape(-1))
  assert total['tokens'] == 20 and total['routed'] == 10 and total['load'].sum() == 20
  cut = mixer(logits[1:], 2, eps=0.3), mixer(logits[:1, :4], 2, eps=0.3)
  want = jax.tree.map(jnp.add, *(sums_of(r) for r in cut))
  jax.tree.map(np.testing.assert_array_equal, total, want)


def test_routers_without_a_gradient_and_with_all_of_it():
  logits = jax.random.normal(jax.random.key(0), (1, 9, 4))
  got = finished(jax.jit(lambda z: hashed.route(jnp.arange(9)[None], z))(logits))
  assert got['no_router_gradient'] == 1 and got['gates_of_one'] == 1 and got['candidates'] == 1
  got = finished(top_k(logits, 2))
  assert got['no_router_gradient'] == 0 and got['candidates'] == 4


def test_experts_evaluated_for_their_gradient_are_no_load():
  logits = jax.random.normal(jax.random.key(0), (1, 9, 4))
  dense, sparse = jax.jit(
      lambda z: [estimators.densemixer(z, 2, dense=d) for d in (True, False)]
  )(logits)
  for name, value in finished(sparse).items():
    np.testing.assert_allclose(finished(dense)[name], value, rtol=1e-6, err_msg=name)


def test_sums_of_parts_are_the_sums_of_the_whole():
  logits = jax.random.normal(jax.random.key(0), (4, 8, 5))
  route = lambda z: mixer(z, 2, eps=0.3, capacity=3)
  parts = [sums_of(route(logits[i : i + 1])) for i in range(4)]
  whole = sums_of(route(logits))
  jax.tree.map(
      lambda want, *got: np.testing.assert_allclose(sum(got), want, rtol=1e-6), whole, *parts
  )
  assert float(whole['tokens'] - whole['load'].sum()) > 0


def test_layers_have_their_own_and_the_mean():
  logits = jax.random.normal(jax.random.key(0), (1, 8, 4))
  routings = {'encoder/a': top_k(logits, 2), 'decoder/b': mixer(logits, 1)}
  sums = metrics.layer_sums(routings, {})
  done = metrics.finish_layers({'loss': jnp.float32(3), **sums})
  want = {path: metrics.finish(sums_of(r)) for path, r in routings.items()}
  for name in metrics.NAMES:
    values = [float(want[path][name]) for path in routings]
    assert [float(done[f'{name}/{path}']) for path in routings] == values
    assert float(done[name]) == pytest.approx(np.mean(values), rel=1e-6)
  extra = {f'{n}/{p}' for n in (*metrics.NAMES, 'load') for p in routings}
  assert set(done) == {'loss', *metrics.NAMES, *extra}
  assert metrics.finish_layers({'loss': 1.0}) == {'loss': 1.0}


def test_finish_of_nothing_is_finite():
  none = jax.tree.map(jnp.zeros_like, sums_of(top_k(jnp.zeros((1, 2, 3)), 1)))
  assert all(np.isfinite(x).all() for x in metrics.finish(none).values())
