"""Attention by XLA: texts that are long but not too long go a block of queries at a time."""

import jax
import jax.numpy as jnp


def attend(
    q_btnh: jax.Array, k_bsgh: jax.Array, v_bsgh: jax.Array, mask_b1ts: jax.Array, in_order: bool
) -> jax.Array:
  """See `api.attend`; the query heads of a key head are rows of one product."""
  t, s = q_btnh.shape[1], k_bsgh.shape[1]
  k_bgsh, v_bgsh = k_bsgh.transpose(0, 2, 1, 3), v_bsgh.transpose(0, 2, 1, 3)
  block = _block(t) if in_order and t == s else t
  mixed = []
  for i in range(0, t, block):
    own, seen = slice(i, i + block), slice(0, i + block if block < t else s)
    mixed.append(_mix(
        q_btnh[:, own], k_bgsh[:, :, seen], v_bgsh[:, :, seen], mask_b1ts[:, :, own, seen]
    ))
  return jnp.concatenate(mixed, axis=1) if len(mixed) > 1 else mixed[0]


def _block(t: int) -> int:
  """Queries that go together: at least 128 of them, at most 8 blocks."""
  return t if t > 2048 else 128 * max(1, -(-t // 1024))


def _mix(q_btnh, k_bgsh, v_bgsh, mask_b1ts):
  b, t, n, h = q_btnh.shape
  g, s = k_bgsh.shape[1:3]
  dtype = jnp.promote_types(q_btnh.dtype, jnp.float32)
  grouped = q_btnh.reshape(b, t, g, n // g, h).transpose(0, 2, 3, 1, 4)
  scores = jax.lax.dot_general(
      grouped.reshape(b, g, n // g * t, h), k_bgsh,
      (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=dtype,
  ).reshape(b, g, n // g, t, s)
  least = jnp.finfo(dtype).min * 0.7  # Room to take a row's maximum off.
  scores = jnp.where(mask_b1ts[:, :, None], scores, least)
  top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  # Divided by their sum after the product with the values, which has fewer columns.
  parts = jnp.exp((scores - top) * h**-0.5)
  mixed = jax.lax.dot_general(
      parts.astype(v_bgsh.dtype).reshape(b, g, n // g * t, s), v_bgsh,
      (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=dtype,
  ) / parts.sum(-1).reshape(b, g, n // g * t, 1)
  mixed = mixed.astype(q_btnh.dtype)
  return mixed.reshape(b, g, n // g, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)
