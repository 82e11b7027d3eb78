"""Attention with its own gradients, which hold no probabilities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import cpu, ref


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    q_btnh: jax.Array, k_bsgh: jax.Array, v_bsgh: jax.Array, mask_b1ts: jax.Array, in_order: bool
) -> jax.Array:
  """`api.attend` in C++ on CPUs, differentiable in q, k and v; by XLA where it is lowered for
  another platform."""
  return _both(q_btnh, k_bsgh, v_bsgh, mask_b1ts, in_order)[0]


def _both(q_btnh, k_bsgh, v_bsgh, mask_b1ts, in_order):
  def by_xla(q, k, v, mask):
    b, t, n, _ = q.shape
    return ref.attend(q, k, v, mask, in_order), jnp.zeros((b, n, t), jnp.float32)

  return jax.lax.platform_dependent(
      q_btnh, k_bsgh, v_bsgh, mask_b1ts, cpu=cpu.attend, default=by_xla
  )


def _fwd(q_btnh, k_bsgh, v_bsgh, mask_b1ts, in_order):
  out_btnh, whole_bnt = _both(q_btnh, k_bsgh, v_bsgh, mask_b1ts, in_order)
  return out_btnh, (q_btnh, k_bsgh, v_bsgh, mask_b1ts, out_btnh, whole_bnt)


def _bwd(in_order, residuals, dout_btnh):
  def by_xla(q, k, v, mask, out, whole, dout):
    del out, whole
    own = lambda q, k, v: ref.attend(q, k, v, mask, in_order)
    return jax.vjp(own, q, k, v)[1](dout)

  grads = jax.lax.platform_dependent(
      *residuals, dout_btnh, cpu=cpu.gradients, default=by_xla
  )
  return *grads, np.zeros(residuals[3].shape, jax.dtypes.float0)


attend.defvjp(_fwd, _bwd)
