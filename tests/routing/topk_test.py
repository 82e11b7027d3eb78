"""Softmax top-k, worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import topk

route = jax.jit(topk.route, static_argnames=('k', 'normalize', 'capacity'))

# softmax: (4, 3, 2, 1) / 10.
LOGITS = jnp.log(jnp.array([[[4.0, 3.0, 2.0, 1.0]]]))


@pytest.mark.parametrize('normalize, want', [(False, [0.4, 0.3]), (True, [4 / 7, 3 / 7])])
def test_gates_are_probabilities_or_shares_of_the_chosen(normalize, want):
  routing = route(LOGITS, 2, normalize=normalize)
  np.testing.assert_array_equal(routing.choice_mk, [[0, 1]])
  np.testing.assert_allclose(routing.gate_mk, [want], rtol=1e-6)


def test_normalised_gates_of_all_experts_are_the_softmax():
  routing = route(LOGITS[..., ::-1], 4, normalize=True)
  np.testing.assert_array_equal(routing.choice_mk, [[3, 2, 1, 0]])
  np.testing.assert_allclose(routing.gate_mk, [[0.4, 0.3, 0.2, 0.1]], rtol=1e-6)


def test_normalised_gates_depend_on_the_chosen_logits_only():
  grad = jax.grad(lambda z: route(z, 2, normalize=True).gate_mk[0, 0])(LOGITS)
  # g = a / (a + b): dg/dz_0 = g (1 - g), dg/dz_1 = -g (1 - g), nothing for the others.
  g = 4 / 7
  np.testing.assert_allclose(grad[0, 0], [g * (1 - g), -g * (1 - g), 0.0, 0.0], atol=1e-6)


def test_balance_loss_counts_every_choice():
  # Both tokens choose experts 0 and 1: f = (1, 1, 0, 0), P = (4, 3, 2, 1) / 10: 4 * 0.7.
  routing = route(jnp.tile(LOGITS, (1, 2, 1)), 2)
  assert routing.load_balance_loss == pytest.approx(2.8, rel=1e-6)
  np.testing.assert_array_equal(routing.load_e, [2, 2, 0, 0])


def test_capacity_keeps_first_choices_and_zeroes_the_gates_of_the_others():
  # Three equal tokens, capacity 2: the third loses both its choices.
  routing = route(jnp.tile(LOGITS, (1, 3, 1)), 2, capacity=2)
  np.testing.assert_array_equal(routing.keep_mk, [[1, 1], [1, 1], [0, 0]])
  np.testing.assert_array_equal(routing.gate_mk[2], [0.0, 0.0])
  np.testing.assert_array_equal(routing.load_e, [2, 2, 0, 0])
