"""Sums over the choices of a token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import dispatch


@pytest.mark.parametrize('count', [1, 2, 8, 9, 30])
def test_choices_are_summed_and_their_gradient_is_spread(count):
  x = np.random.default_rng(0).standard_normal((5, count, 7)).astype(np.float32)
  y, pull = jax.vjp(dispatch.sum_choices, jnp.asarray(x))
  np.testing.assert_allclose(y, x.astype(np.float64).sum(1), rtol=1e-5, atol=1e-5)
  dy = jnp.arange(35.0).reshape(5, 7)
  np.testing.assert_array_equal(
      pull(dy)[0], np.broadcast_to(np.asarray(dy)[:, None], (5, count, 7))
  )


@pytest.mark.parametrize('count', [8, 16])
def test_a_sum_of_bfloat16_is_rounded_once(count):
  """Beside 256 a bfloat16 keeps steps of 2: one 1 after another would all be lost."""
  x = jnp.ones((1, count, 1), jnp.bfloat16).at[0, 0, 0].set(256)
  assert float(dispatch.sum_choices(x)[0, 0]) == {8: 264.0, 16: 272.0}[count]
