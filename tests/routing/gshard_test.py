"""GShard's top-2 with a random second expert, worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import draws as draws_lib
from moejax.routing import gshard

route = jax.jit(gshard.route, static_argnames=('capacity',))

# softmax (6, 3, 1) / 10; of the two best 2/3 and 1/3, so the second is sent with probability 2/3.
LOGITS = jnp.log(jnp.array([[[6.0, 3.0, 1.0]]]))


def recorded(*uniforms):
  m = len(uniforms)
  return draws_lib.Draws(
      exponential=jnp.ones((2, m, 3)), uniform=jnp.array([[0.99] * m, list(uniforms)])
  )


def test_gates_are_normalised_over_the_two_and_evaluation_sends_both():
  routing = route(LOGITS)
  np.testing.assert_array_equal(routing.choice_mk, [[0, 1]])
  np.testing.assert_allclose(routing.gate_mk, [[2 / 3, 1 / 3]], rtol=1e-6)
  assert routing.keep_mk.all()


def test_the_second_is_sent_below_twice_its_gate_and_the_first_keeps_its_gate():
  routing = route(jnp.tile(LOGITS, (1, 2, 1)), draws=recorded(0.66, 0.67))
  np.testing.assert_array_equal(routing.keep_mk, [[1, 1], [1, 0]])
  np.testing.assert_allclose(routing.gate_mk, [[2 / 3, 1 / 3], [2 / 3, 0.0]], rtol=1e-6)
  np.testing.assert_array_equal(routing.candidates_mk, [[3, 2], [3, 0]])
  # f = (1, 1/2, 0), P = (0.6, 0.3, 0.1): 3 * (0.6 + 0.15).
  assert routing.load_balance_loss == pytest.approx(2.25, rel=1e-6)


def test_share_of_seconds_sent_is_their_probability():
  m = 20_000
  routing = route(jnp.tile(LOGITS, (1, m, 1)), key=jax.random.key(0))
  # Mean 2/3, standard error sqrt(2/9 / 20,000) = 0.0033.
  assert abs(float(routing.keep_mk[:, 1].mean()) - 2 / 3) < 5 * 0.0034
  assert routing.keep_mk[:, 0].all()


def test_equal_gates_send_the_second_always():
  routing = route(jnp.zeros((1, 500, 2)), key=jax.random.key(0))
  assert routing.keep_mk.all()


def test_a_second_that_is_not_sent_takes_no_place():
  # Three tokens, all (0, 1); capacity 2 on expert 1. The second token's coin leaves its second out,
  # so the third still fits there; on expert 0 the third does not.
  routing = route(
      jnp.tile(LOGITS, (1, 3, 1)), draws=recorded(0.1, 0.9, 0.1), capacity=2
  )
  np.testing.assert_array_equal(routing.keep_mk, [[1, 1], [1, 0], [0, 1]])
  np.testing.assert_array_equal(routing.load_e, [2, 2, 0])
