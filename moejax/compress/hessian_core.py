"""Layer Hessians of GPTQ from the inputs of a matrix (QMoE, arXiv 2310.16795, section 3.2)."""

import jax
import jax.numpy as jnp


@jax.jit
def gram(x_md: jax.Array) -> jax.Array:
  """X^T X in float32, [d, d]; rows of zeros add nothing, so padding is free."""
  x = x_md.astype(jnp.float32)
  return jnp.einsum('md,mc->dc', x, x, precision='highest')


def scale_gram(gram_edd: jax.Array, tokens_e: jax.typing.ArrayLike) -> jax.Array:
  """H = X^T X * tokens / 2, the scale of the published code; identity where tokens is 0.

  The factor matters only for the 1e-6 floor of the damping and for printed errors.
  """
  tokens = jnp.asarray(tokens_e, jnp.float32)[:, None, None]
  eye = jnp.eye(gram_edd.shape[-1], dtype=jnp.float32)[None]
  return jnp.where(tokens > 0, gram_edd * (tokens / 2), eye)


def hessian(x_md: jax.Array) -> jax.Array:
  """H = X^T X * m / 2 of one expert's inputs [m, d], float32 [d, d]; identity for m = 0."""
  if x_md.shape[0] == 0:
    return jnp.eye(x_md.shape[1], dtype=jnp.float32)
  return gram(x_md) * (x_md.shape[0] / 2)


@jax.jit
def quadratic(h_edd: jax.Array, w_edf: jax.Array) -> jax.Array:
  """w^T H w of each output, [e, f]: the squared norm of its output over the calibration tokens."""
  w = w_edf.astype(jnp.float32)
  return jnp.sum(w * jnp.einsum('edc,ecf->edf', h_edd, w, precision='highest'), axis=1)
