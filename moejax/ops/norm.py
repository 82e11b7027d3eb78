"""Normalisation."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale_d: jax.Array, eps: float) -> jax.Array:
  """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32; returns x's dtype.

  Root mean square layer norm (arXiv 1910.07467), T5's pre-norm: no mean, no bias.
  """
  x32 = x.astype(jnp.float32)
  y = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)
  scale = scale_d.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
  return (y * scale).astype(x.dtype)
