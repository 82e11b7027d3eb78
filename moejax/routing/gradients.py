"""The value of one expression with the gradient of another: what every estimator is made of."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def replace_gradient(value: jax.Array, carrier: jax.Array) -> jax.Array:
  """Returns `value`, bit for bit; its gradient goes to `carrier` alone. Shapes must agree."""
  del carrier
  return value


def _forward(value, carrier):
  del carrier
  return value, None


def _backward(_, g):
  return jnp.zeros_like(g), g


replace_gradient.defvjp(_forward, _backward)


def slope(probs_me: jax.Array, logits_me: jax.Array) -> jax.Array:
  """A function of the logits whose Jacobian is diag(p) - p p^T, p held constant, [m, e].

  That is the Jacobian of a softmax whose value is p. Its own value means nothing: use it as a
  carrier. Experts of probability 0 neither give nor get a gradient.
  """
  p = jax.lax.stop_gradient(probs_me)
  return p * (logits_me - jnp.sum(p * logits_me, axis=-1, keepdims=True))


def pick(x_me: jax.Array, choice_m: jax.Array) -> jax.Array:
  """The entry of each token's expert, [m]; by comparing, so that the gradient scatters nothing."""
  mine_me = jnp.arange(x_me.shape[-1])[None] == choice_m[:, None]
  return jnp.sum(jnp.where(mine_me, x_me, 0.0), axis=-1)
