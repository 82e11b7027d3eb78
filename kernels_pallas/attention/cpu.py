"""Attention in C++ for CPUs: keys that no query of a block sees cost nothing, scores no memory.

What is kept for the gradients is the logarithm of each query's sum of exponentials (FlashAttention,
arXiv 2205.14135, section 3); probabilities are made anew from it.
"""

import jax
import jax.numpy as jnp

from kernels_pallas import extension

# Units of work that the gradients are divided into, so many that a CPU's threads end together.
_UNITS = 16


def attend(
    q_btnh: jax.Array, k_bsgh: jax.Array, v_bsgh: jax.Array, mask_b1ts: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """`api.attend`, and the logarithm of each query's sum of exponentials, float32 [b, n, t].

  A query that sees no key gets 0, and infinity for the logarithm.
  """
  b, t, n, _ = q_btnh.shape
  out = jax.ShapeDtypeStruct(q_btnh.shape, q_btnh.dtype)
  call = extension.call(extension.ATTENTION, (out, jax.ShapeDtypeStruct((b, n, t), jnp.float32)))
  return call(q_btnh, k_bsgh, v_bsgh, mask_b1ts)


def gradients(
    q_btnh: jax.Array, k_bsgh: jax.Array, v_bsgh: jax.Array, mask_b1ts: jax.Array,
    out_btnh: jax.Array, whole_bnt: jax.Array, dout_btnh: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of q, k and v, from what `attend` gave and the gradient of its first result."""
  b, s, g, h = k_bsgh.shape
  parts = min(-(-_UNITS // max(b * g, 1)), q_btnh.shape[1])
  sums = jax.ShapeDtypeStruct((max(parts, 1), b, s, g, h), jnp.float32)
  out = (jax.ShapeDtypeStruct(q_btnh.shape, q_btnh.dtype), sums, sums)
  call = extension.call(extension.ATTENTION_GRADIENTS, out)
  dq, dk, dv = call(q_btnh, k_bsgh, v_bsgh, mask_b1ts, out_btnh, whole_bnt, dout_btnh)
  return dq, dk.sum(0).astype(k_bsgh.dtype), dv.sum(0).astype(v_bsgh.dtype)
