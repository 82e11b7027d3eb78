"""Normalisation."""

import jax
import jax.numpy as jnp


def _rows(a_d: jax.Array, ndim: int) -> jax.Array:
  return a_d.astype(jnp.float32).reshape((1,) * (ndim - 1) + (-1,))


def rms_norm(x: jax.Array, scale_d: jax.Array, eps: float) -> jax.Array:
  """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32; returns x's dtype.

  Root mean square layer norm (arXiv 1910.07467), T5's pre-norm: no mean, no bias.
  """
  x32 = x.astype(jnp.float32)
  y = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)
  return (y * _rows(scale_d, x.ndim)).astype(x.dtype)


def layer_norm(x: jax.Array, scale_d: jax.Array, bias_d: jax.Array, eps: float) -> jax.Array:
  """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis, in float32.

  arXiv 1607.06450; the variance is the biased one. Returns x's dtype.
  """
  x32 = x.astype(jnp.float32)
  centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
  y = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + eps)
  return (y * _rows(scale_d, x.ndim) + _rows(bias_d, x.ndim)).astype(x.dtype)


def norm(x: jax.Array, scale_d: jax.Array, bias_d: jax.Array | None, eps: float) -> jax.Array:
  """`layer_norm` where there is a bias, else `rms_norm`."""
  return rms_norm(x, scale_d, eps) if bias_d is None else layer_norm(x, scale_d, bias_d, eps)
