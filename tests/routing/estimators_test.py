"""The other estimators, worked by hand and against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import draws as draws_lib
from moejax.routing import estimators, topk

# softmax (4, 3, 1) / 8.
LOGITS = jnp.log(jnp.array([[[4.0, 3.0, 1.0]]]))
P = np.array([4, 3, 1]) / 8
JACOBIAN = np.diag(P) - np.outer(P, P)
# A cotangent of each expert's gate: what the loss would say of E_i.
COTANGENT = np.array([5.0, -2.0, 7.0])


def forced(*choices, experts=3):
  wanted = np.arange(experts) == np.array(choices)[:, None]
  exponential = jnp.array(np.where(wanted, 1e-20, 1.0), jnp.float32)[:, None]
  return draws_lib.Draws(exponential=exponential, uniform=jnp.zeros((len(choices), 1)))


def logit_gradient(route, logits=LOGITS):
  """The gradient of sum_i cotangent_i gate_i, over the columns that the router returns."""

  def fn(z):
    routing = route(z)
    return (routing.gate_mk * jnp.array(COTANGENT)[routing.choice_mk]).sum()

  return np.asarray(jax.jit(jax.grad(fn))(logits))[0, 0]


def test_sampled_gating_differentiates_the_gate_of_the_draw():
  route = lambda z: estimators.sampled_gating(z, 1, draws=forced(1))
  np.testing.assert_allclose(jax.jit(route)(LOGITS).gate_mk, [[3 / 8]], rtol=1e-6)
  np.testing.assert_allclose(logit_gradient(route), -2 * JACOBIAN[1], atol=1e-6)


def test_straight_through_by_its_formula():
  # w_i = p_i E_i: sum_i w_i dp_i/dz, whatever was drawn.
  route = lambda z: estimators.straight_through(z, 1, draws=forced(1))
  want = (COTANGENT * P) @ JACOBIAN
  np.testing.assert_allclose(logit_gradient(route), want, atol=1e-6)


def test_reinmax_by_its_formula():
  route = lambda z: estimators.reinmax(z, 1, draws=forced(1))
  q = (P + np.eye(3)[1]) / 2
  matrix = 2 * (np.diag(q) - np.outer(q, q)) - JACOBIAN / 2
  np.testing.assert_allclose(logit_gradient(route), (COTANGENT * P) @ matrix, atol=1e-6)


@pytest.mark.parametrize('estimator', [estimators.straight_through, estimators.reinmax])
def test_dense_columns_start_with_the_choices_and_count_in_no_load(estimator):
  # Draws 2, then 0: p_2 = 1/8, then p_0 = 4/7 of what is left. Expert 1 has gate 0.
  routing = jax.jit(lambda z: estimator(z, 2, draws=forced(2, 0)))(LOGITS)
  np.testing.assert_array_equal(routing.choice_mk, [[2, 0, 1]])
  np.testing.assert_allclose(routing.gate_mk, [[1 / 8, 4 / 7, 0.0]], rtol=1e-6)
  assert routing.keep_mk.all()
  np.testing.assert_array_equal(routing.load_e, [1, 0, 1])
  np.testing.assert_array_equal(routing.candidates_mk, [[3, 2, 0]])
  # f = (1, 0, 1), P = (4, 3, 1) / 8: 3 * 5 / 8.
  assert routing.load_balance_loss == pytest.approx(15 / 8, rel=1e-6)


def test_two_choices_add_a_term_each():
  route = lambda z: estimators.straight_through(z, 2, draws=forced(2, 0))
  left = np.array([4, 3, 0]) / 7
  want = (COTANGENT * P) @ JACOBIAN + (COTANGENT * left) @ (np.diag(left) - np.outer(left, left))
  np.testing.assert_allclose(logit_gradient(route), want, atol=1e-6)


@pytest.mark.parametrize('estimator', [
    estimators.straight_through, estimators.reinmax, estimators.reinforce,
])
def test_evaluation_is_sparse_and_greedy(estimator):
  routing = jax.jit(lambda z: estimator(z, 2))(LOGITS)
  np.testing.assert_array_equal(routing.choice_mk, [[0, 1]])
  np.testing.assert_allclose(routing.gate_mk, [[4 / 8, 3 / 4]], rtol=1e-6)
  assert routing.log_prob_m is None


def test_reinforce_gives_the_log_probability_and_no_gate_gradient():
  routing = jax.jit(lambda z: estimators.reinforce(z, 2, draws=forced(2, 0)))(LOGITS)
  np.testing.assert_allclose(routing.log_prob_m, [np.log(1 / 8 * 4 / 7)], rtol=1e-6)
  np.testing.assert_allclose(routing.gate_mk, [[1 / 8, 4 / 7]], rtol=1e-6)
  route = lambda z: estimators.reinforce(z, 2, draws=forced(2, 0))
  np.testing.assert_array_equal(logit_gradient(route), np.zeros(3))
  grad = jax.jit(jax.grad(lambda z: route(z).log_prob_m.sum()))(LOGITS)
  # d log p_2 = onehot(2) - p, d log q_0 = onehot(0) - (4, 3, 0) / 7.
  want = np.eye(3)[2] - P + np.eye(3)[0] - np.array([4, 3, 0]) / 7
  np.testing.assert_allclose(grad[0, 0], want, atol=1e-6)


def test_surrogate_loss_is_a_weighted_mean_of_gains():
  log_prob, loss = jnp.array([0.5, -1.0, 2.0]), jnp.array([3.0, 4.0, 100.0])
  weight = jnp.array([1.0, 1.0, 0.0])
  fn = lambda lp, loss: estimators.surrogate_loss(lp, loss, 1.0, weight)
  # ((3 - 1) * 0.5 + (4 - 1) * -1) / 2; no gradient to the losses.
  assert fn(log_prob, loss) == pytest.approx(-1.0)
  by_log_prob, by_loss = jax.grad(fn, (0, 1))(log_prob, loss)
  np.testing.assert_allclose(by_log_prob, [1.0, 1.5, 0.0])
  np.testing.assert_array_equal(by_loss, np.zeros(3))
  assert estimators.surrogate_loss(log_prob, loss) == pytest.approx((1.5 - 4.0 + 200.0) / 3)


def test_padding_has_no_log_probability():
  logits = jnp.tile(LOGITS, (1, 2, 1))
  valid = jnp.array([[True, False]])
  fn = lambda z: estimators.reinforce(z, 1, key=jax.random.key(0), valid_bt=valid)
  routing = jax.jit(fn)(logits)
  assert routing.log_prob_m[0] < 0 and routing.log_prob_m[1] == 0


def test_densemixer_is_top_k_forward_and_dense_backward():
  route = lambda z: estimators.densemixer(z, 1)
  routing = jax.jit(route)(LOGITS)
  np.testing.assert_array_equal(routing.choice_mk, [[0, 1, 2]])
  np.testing.assert_allclose(routing.gate_mk, [[0.5, 0.0, 0.0]], rtol=1e-6)
  np.testing.assert_array_equal(routing.load_e, [1, 0, 0])
  np.testing.assert_allclose(logit_gradient(route), COTANGENT @ JACOBIAN, atol=1e-6)
  sparse = lambda z: estimators.densemixer(z, 1, dense=False)
  np.testing.assert_allclose(logit_gradient(sparse), 5 * JACOBIAN[0], atol=1e-6)


def test_densemixer_with_normalised_gates():
  # The chosen two sum to s = 7/8: their gates are p / s with s varying, the third's is p_2 / s with
  # s held. d(p_0 / s) = (4/7)(3/7)(e_0 - e_1) = -d(p_1 / s).
  route = lambda z: estimators.densemixer(z, 2, normalize=True)
  np.testing.assert_allclose(jax.jit(route)(LOGITS).gate_mk, [[4 / 7, 3 / 7, 0.0]], rtol=1e-6)
  pair = 12 / 49 * np.array([1.0, -1.0, 0.0])
  want = COTANGENT[0] * pair - COTANGENT[1] * pair + COTANGENT[2] * JACOBIAN[2] * 8 / 7
  np.testing.assert_allclose(logit_gradient(route), want, atol=1e-6)


def test_densemixer_of_all_experts_is_the_dense_layer():
  full = lambda z: estimators.densemixer(z, 3)
  plain = lambda z: topk.route(z, 3)
  gates = jax.jit(lambda z: (full(z).gate_mk, plain(z).gate_mk))(LOGITS)
  np.testing.assert_array_equal(*gates)
  np.testing.assert_allclose(logit_gradient(full), logit_gradient(plain), atol=1e-7)


def test_capacity_drops_choices_but_not_what_is_evaluated_for_its_gradient():
  fn = jax.jit(lambda z: estimators.densemixer(z, 1, capacity=2))
  routing = fn(jnp.tile(LOGITS, (1, 3, 1)))
  np.testing.assert_array_equal(routing.keep_mk, [[1, 1, 1], [1, 1, 1], [0, 1, 1]])
  np.testing.assert_array_equal(routing.load_e, [2, 0, 0])
