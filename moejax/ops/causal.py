"""Attention within one stack, mostly causal: grouped queries, windows, packed documents."""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from kernels_pallas.attention import api as attention
from kernels_pallas.attention import ref as attention_by_xla
from moejax import sharding
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
    q_btnh: jax.Array, k_bsgh: jax.Array, v_bsgh: jax.Array, mask_b1ts: jax.Array, *,
    in_order: bool = False, window: int | None = None, segment_bt: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
  """`kernels_pallas.attention.api.attend`; on a mesh each device attends for its texts and heads.

  Where they do not divide over the devices XLA divides its own products.
  """
  run = functools.partial(
      attention.attend, in_order=in_order, window=window,
      platform='' if mesh is None else mesh.devices.flat[0].platform,
  )
  if mesh is None or mesh.size == 1:
    return run(q_btnh, k_bsgh, v_bsgh, mask_b1ts, segment_bt=segment_bt)
  if len(mask_b1ts) % sharding.batch_ways(mesh) or k_bsgh.shape[2] % mesh.shape['tensor']:
    return attention_by_xla.attend(q_btnh, k_bsgh, v_bsgh, mask_b1ts, in_order)
  rows = PartitionSpec(sharding.BATCH_AXES)
  heads = PartitionSpec(sharding.BATCH_AXES, None, 'tensor')
  return sharding.manual(
      lambda *args: run(*args[:4], segment_bt=args[4]), mesh,
      in_specs=(heads, heads, heads, rows, rows), out_specs=heads,
  )(q_btnh, k_bsgh, v_bsgh, mask_b1ts, segment_bt)


def output(params: Mapping[str, Any], mixed_btnh: jax.Array) -> jax.Array:
  """Heads back to the model's width, with o [n, h, d] and perhaps o_bias [d]."""
  y = linear(mixed_btnh, params['o'], contract=2)
  if 'o_bias' in params:
    y = y + params['o_bias'].astype(y.dtype)[None, None]
  return y
