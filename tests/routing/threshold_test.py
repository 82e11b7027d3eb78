"""XMoE's threshold router, worked by hand and by its defining property."""

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import threshold

route = jax.jit(threshold.route, static_argnames=('threshold', 'limit', 'normalize', 'capacity'))
route_at = jax.jit(threshold.route)

# softmax (8, 5, 2, 1) / 16 in another order.
LOGITS = jnp.log(jnp.array([[[2.0, 8.0, 1.0, 5.0]]]))


@pytest.mark.parametrize('level, sent', [
    (0.4, 1), (0.49, 1), (0.51, 2), (0.81, 2), (0.82, 3), (0.93, 3), (0.94, 4), (1.0, 4),
])
def test_smallest_set_that_reaches_the_threshold(level, sent):
  routing = route(LOGITS, level)
  np.testing.assert_array_equal(routing.choice_mk, [[1, 3, 0, 2]])
  np.testing.assert_array_equal(routing.keep_mk[0], np.arange(4) < sent)
  want = np.where(np.arange(4) < sent, [8 / 16, 5 / 16, 2 / 16, 1 / 16], 0)
  np.testing.assert_allclose(routing.gate_mk[0], want, rtol=1e-6)
  np.testing.assert_array_equal(routing.candidates_mk[0], np.where(np.arange(4) < sent, 4, 0))
  # The balance loss is Switch's: f = onehot(1), P_1 = 1/2: 4 / 2.
  assert routing.load_balance_loss == pytest.approx(2.0, rel=1e-6)


def test_a_limit_fixes_the_columns():
  routing = route(LOGITS, 1.0, limit=2)
  np.testing.assert_array_equal(routing.choice_mk, [[1, 3]])
  assert routing.keep_mk.all()
  assert route(LOGITS, 1.0, limit=9).choice_mk.shape == (1, 4)


def test_normalised_gates_sum_to_one_over_the_set():
  routing = route(LOGITS, 0.7, normalize=True)
  np.testing.assert_allclose(routing.gate_mk, [[8 / 13, 5 / 13, 0.0, 0.0]], rtol=1e-6)


def test_capacity_serves_better_ranks_first():
  # Token 0 ranks (0, 1), token 1 ranks (1, 0), threshold takes both; capacity 1 keeps the firsts.
  logits = jnp.log(jnp.array([[[3.0, 2.0], [2.0, 3.0]]]))
  routing = route(logits, 1.0, capacity=1)
  np.testing.assert_array_equal(routing.keep_mk, [[1, 0], [1, 0]])


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(st.integers(0, 2**31), st.floats(0.05, 0.95), st.sampled_from([0.1, 1.0, 50.0]))
def test_no_smaller_set_reaches_it(seed, level, scale):
  logits = scale * jax.random.normal(jax.random.key(seed), (1, 16, 6))
  routing = jax.device_get(route_at(logits, level))
  probs = np.asarray(jax.nn.softmax(logits[0], -1), np.float64)
  for token in range(16):
    sent = int(routing.keep_mk[token].sum())
    mass = np.sort(probs[token])[::-1]
    assert mass[:sent].sum() >= level - 1e-6
    assert mass[: sent - 1].sum() < level + 1e-6
    np.testing.assert_allclose(probs[token][routing.choice_mk[token]], mass, atol=1e-7)
