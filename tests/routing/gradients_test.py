"""The two building blocks of the estimators."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.routing import gradients


def test_value_of_one_and_gradient_of_the_other():
  fn = lambda x: gradients.replace_gradient(x**2, 5.0 * x)
  value, grad = jax.value_and_grad(fn)(3.0)
  assert value == 9.0 and grad == 5.0
  batch = jax.vmap(jax.value_and_grad(fn))(jnp.array([1.0, 2.0]))
  np.testing.assert_array_equal(batch[0], [1.0, 4.0])
  np.testing.assert_array_equal(batch[1], [5.0, 5.0])


def test_slope_is_the_jacobian_of_the_softmax():
  logits = np.random.default_rng(0).standard_normal((1, 5)).astype(np.float32)
  got, softmax = jax.jit(lambda z: (
      jax.jacobian(lambda y: gradients.slope(jax.nn.softmax(y), y))(z),
      jax.jacobian(jax.nn.softmax)(z),
  ))(logits)
  p = np.exp(logits[0]) / np.exp(logits[0]).sum()
  np.testing.assert_allclose(got[0, :, 0], np.diag(p) - np.outer(p, p), atol=1e-6)
  np.testing.assert_allclose(got, softmax, atol=1e-6)


def test_pick_takes_each_tokens_own():
  x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
  np.testing.assert_array_equal(gradients.pick(x, jnp.array([1, 0])), [2.0, 3.0])
