"""Hand-worked routing cases: the arithmetic of each expected value is in the comments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import dispatch, losses, router, switch

route = jax.jit(switch.route, static_argnames='capacity')


def logits_for(choices, experts, high=2.0):
  """Logits whose arg-max is the given expert of each token: `high` there, 0 elsewhere."""
  return high * jax.nn.one_hot(jnp.array(choices), experts)


def test_gate_is_the_probability_of_the_winner():
  routing = route(logits_for([[2, 0]], 3, high=np.log(2.0)))
  # softmax of (ln 2, 0, 0) = (2, 1, 1) / 4: the winner has 1/2.
  np.testing.assert_allclose(routing.gate_mk, [[0.5], [0.5]], rtol=1e-6)
  np.testing.assert_array_equal(routing.choice_mk, [[2], [0]])
  np.testing.assert_array_equal(routing.load_e, [1, 0, 1])


def test_capacity_drops_later_tokens_of_each_sequence():
  # Expert 1 is wanted by places 0, 1, 3 of sequence 0 and by all of sequence 1. Capacity 2 keeps
  # the first two of each sequence.
  routing = route(logits_for([[1, 1, 0, 1], [1, 1, 1, 1]], 3), capacity=2)
  keep = np.asarray(routing.keep_mk).reshape(2, 4)
  np.testing.assert_array_equal(keep, [[1, 1, 1, 0], [1, 1, 0, 0]])
  np.testing.assert_array_equal(routing.load_e, [1, 4, 0])
  assert not np.any(np.asarray(routing.gate_mk)[~np.asarray(routing.keep_mk)])


def test_padding_takes_no_capacity_and_goes_nowhere():
  valid = jnp.array([[False, True, True, True]])
  routing = route(logits_for([[1, 1, 1, 1]], 2), capacity=2, valid_bt=valid)
  np.testing.assert_array_equal(np.asarray(routing.keep_mk)[:, 0], [False, True, True, False])


def test_load_balance_loss_by_hand():
  # 4 tokens, 2 experts, all to expert 0 with probability 3/4:
  # f = (1, 0), P = (3/4, 1/4), loss = 2 * 3/4.
  logits = logits_for([[0, 0, 0, 0]], 2, high=np.log(3.0))
  assert route(logits).load_balance_loss == pytest.approx(1.5, rel=1e-6)
  # Evenly split: f = P = (1/2, 1/2), loss = 2 * (1/4 + 1/4) = 1, its smallest value.
  logits = logits_for([[0, 1, 0, 1]], 2, high=np.log(3.0))
  assert route(logits).load_balance_loss == pytest.approx(1.0, rel=1e-6)


def test_load_balance_loss_is_over_the_batch():
  probs = jax.nn.softmax(logits_for([[0, 0], [1, 1]], 2, high=np.log(3.0)))
  choice = jnp.array([[0, 0], [1, 1]])
  # Each sequence alone would have loss 1.5; together f = P = (1/2, 1/2).
  assert losses.load_balance_loss(probs, choice, jnp.ones((2, 2))) == pytest.approx(1.0)


def test_z_loss_by_hand():
  # logsumexp of (0, 0) is ln 2.
  value = losses.z_loss(jnp.zeros((1, 3, 2)), jnp.ones((1, 3)))
  assert value == pytest.approx(np.log(2.0) ** 2, rel=1e-6)


def test_router_computes_in_float32_from_bfloat16():
  x = jax.random.normal(jax.random.key(0), (2, 5, 64)).astype(jnp.bfloat16)
  kernel = jax.random.normal(jax.random.key(1), (64, 8))
  logits = router.router_logits({'kernel': kernel}, x)
  assert logits.dtype == jnp.float32
  exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
  np.testing.assert_allclose(logits, exact, atol=1e-5)


def test_jitter_stays_in_its_band_and_needs_its_key():
  x = jnp.ones((4, 8, 16))
  noisy = np.asarray(router.jitter(x, 0.01, jax.random.key(0)))
  assert noisy.min() >= 0.99 and noisy.max() <= 1.01 and noisy.std() > 0.004
  np.testing.assert_array_equal(noisy, router.jitter(x, 0.01, jax.random.key(0)))


def test_router_gradient_flows_through_gate_and_balance_loss_only():
  logits = jax.random.normal(jax.random.key(0), (1, 6, 4))
  grad = jax.grad(lambda z: route(z).gate_mk.sum())(logits)
  probs = jax.nn.softmax(logits)
  winner = jax.nn.one_hot(jnp.argmax(logits, -1), 4)
  top = (probs * winner).sum(-1, keepdims=True)
  np.testing.assert_allclose(grad, top * (winner - probs), atol=1e-6)


@pytest.mark.parametrize('k', [1, 2, 3])
def test_sort_and_back_is_the_identity(k):
  m, e = 37, 5
  rng = np.random.default_rng(0)
  choice, keep = rng.integers(0, e, (m, k)), rng.random((m, k)) < 0.8
  x, dy = (rng.standard_normal((n, 8)).astype(np.float32) for n in (m, m * k))

  @jax.jit
  def run(choice, keep, x, dy):
    order, inverse, sizes = dispatch.sort_by_expert(choice, keep, e)
    rows = dispatch.permute(x, order, inverse)
    grad = jax.grad(lambda x: (dispatch.permute(x, order, inverse) * dy).sum())(x)
    plain = jax.grad(lambda x: (x[order // k] * dy).sum())(x)
    return order, sizes, dispatch.unpermute(rows, order, inverse), grad, plain

  order, sizes, back, grad, plain = jax.device_get(run(choice, keep, x, dy))
  flat = np.where(keep, choice, e).reshape(-1)
  np.testing.assert_array_equal(flat[order], np.sort(flat))
  np.testing.assert_array_equal(sizes, np.bincount(flat, minlength=e + 1)[:e])
  np.testing.assert_array_equal(back, np.repeat(x, k, axis=0))
  np.testing.assert_allclose(grad, plain, atol=1e-6)
