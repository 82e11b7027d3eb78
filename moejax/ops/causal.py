"""Attention within one stack, mostly causal: grouped queries, windows, packed documents."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moejax.ops import norm, rope
from moejax.ops.linear import linear


def mask(
    query_bt: jax.Array,
    key_bs: jax.Array,
    *,
    window: int | None = None,
    query_segment_bt: jax.Array | None = None,
    key_segment_bs: jax.Array | None = None,
    causal: bool = True,
) -> jax.Array:
  """Which keys a query sees, bool [b, 1, t, s].

  Args:
    query_bt, key_bs: positions. A key is seen from its own position on, and until `window` later;
      without `causal` by queries before it too, less than a window away.
    query_segment_bt, key_segment_bs: numbers of packed documents; a query sees its own only.
      Segment 0 is padding, which nothing sees but itself.
  """
  distance = query_bt[:, :, None] - key_bs[:, None, :]
  if not causal:
    distance = jnp.abs(distance)
  seen = distance >= 0
  if window is not None:
    seen &= distance < window
  if query_segment_bt is not None and key_segment_bs is not None:
    seen &= query_segment_bt[:, :, None] == key_segment_bs[:, None, :]
  return seen[:, None]


def project(
    params: Mapping[str, jax.Array],
    x_btd: jax.Array,
    turn: tuple[jax.Array, jax.Array] | None,
    *,
    eps: float,
    clip: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Queries [b, t, n, h], keys and values [b, t, g, h] of normed inputs.

  Args:
    params: q [d, n, h], k and v [d, g, h]; with them perhaps q_bias, k_bias, v_bias, and q_norm and
      k_norm, scales of an RMS norm over a head [h] or all heads [n * h].
    turn: cos and sin of `rope.angles`; None for learned positions.
    eps: of those norms. clip: bound on every value, after norms.
  """

  def one(name: str) -> jax.Array:
    y = linear(x_btd, params[name])
    if f'{name}_bias' in params:
      y = y + params[f'{name}_bias'].astype(y.dtype)[None, None]
    if f'{name}_norm' in params and params[f'{name}_norm'].shape[0] != y.shape[-1]:
      flat = y.reshape(*y.shape[:2], -1)
      y = norm.rms_norm(flat, params[f'{name}_norm'], eps).reshape(y.shape)
    elif f'{name}_norm' in params:
      y = norm.rms_norm(y, params[f'{name}_norm'], eps)
    return y if clip is None else jnp.clip(y, -clip, clip)

  q, k, v = one('q'), one('k'), one('v')
  if turn is not None:
    q, k = rope.rotate(q, *turn), rope.rotate(k, *turn)
  return q, k, v


def attend(
    q_btnh: jax.Array, k_bsgh: jax.Array, v_bsgh: jax.Array, mask_b1ts: jax.Array,
    in_order: bool = False,
) -> jax.Array:
  """softmax(q k^T / sqrt(h)) v, [b, t, n, h]; query head i looks at key head i * g // n.

  The query heads of a key head are rows of one product. Scores and softmax are at least float32. A
  query that sees no key gets a mean of values, which nothing should read.

  Args:
    in_order: no query sees a key of a later index (t = s). Texts of 129 to 2,048 then go a block of
      queries at a time, each with the keys up to its last, which is little over half of the work:
      2 x 512 tokens took a third of the time on a CPU, with their gradients under half.
  """
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


def output(params: Mapping[str, Any], mixed_btnh: jax.Array) -> jax.Array:
  """Heads back to the model's width, with o [n, h, d] and perhaps o_bias [d]."""
  y = linear(mixed_btnh, params['o'], contract=2)
  if 'o_bias' in params:
    y = y + params['o_bias'].astype(y.dtype)[None, None]
  return y
