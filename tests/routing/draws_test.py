"""Random numbers: from keys, recorded, and at their extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.routing import draws as draws_lib


def test_draws_of_a_key_have_their_distributions():
  made = draws_lib.from_key(jax.random.key(0), 2, 4000, 5)
  first, second = made.exponential
  assert first.shape == (4000, 5) and not np.array_equal(first, second)
  # Exponential(1) has mean and standard deviation 1: 20,000 draws, so +-0.007 each.
  assert abs(float(first.mean()) - 1) < 0.04 and abs(float(first.std()) - 1) < 0.06
  uniform = np.asarray(made.uniform[1])
  assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02


def test_recorded_draws_win_over_a_key_and_nothing_is_evaluation():
  logits = jnp.zeros((3, 2))
  made = draws_lib.from_key(jax.random.key(0), 1, 3, 2)
  assert draws_lib.resolve(jax.random.key(1), made, 1, logits) is made
  assert draws_lib.resolve(None, None, 1, logits) is None
  jax.tree.map(
      np.testing.assert_array_equal, draws_lib.resolve(jax.random.key(0), None, 1, logits), made
  )


@pytest.mark.parametrize('k, m, name', [(2, 3, 'exponential'), (1, 4, 'exponential')])
def test_draws_of_another_shape_are_refused(k, m, name):
  made = draws_lib.from_key(jax.random.key(0), 1, 3, 2)
  with pytest.raises(UserError, match=rf'draws.{name} has shapes \[\(3, 2\)\], the router needs'):
    draws_lib.resolve(None, made, k, jnp.zeros((m, 2)))


def test_uniform_draws_of_another_shape_are_refused():
  made = draws_lib.Draws(exponential=jnp.ones((1, 3, 2)), uniform=jnp.ones((1, 3, 1)))
  with pytest.raises(UserError, match=r'draws.uniform has shapes \[\(3, 1\)\]'):
    draws_lib.resolve(None, made, 1, jnp.zeros((3, 2)))


def test_infinite_noise_never_reaches_an_expert_outside():
  # A draw of 0 is infinite noise: expert 2 is out of the running all the same.
  choice = draws_lib.gumbel_argmax(
      jnp.zeros((1, 3)), jnp.array([[True, True, False]]), jnp.array([[1.0, 0.5, 0.0]])
  )
  np.testing.assert_array_equal(choice, [1])
