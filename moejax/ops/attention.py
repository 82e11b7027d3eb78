"""T5 attention: relative position buckets, no scaling of the scores, softmax in float32."""

from collections.abc import Mapping
import math

import jax
import jax.numpy as jnp
import numpy as np

from moejax.ops.linear import linear

MASKED = -1e9


def relative_buckets(
    target_length: int, source_length: int, *, bidirectional: bool, num_buckets: int,
    max_distance: int,
) -> np.ndarray:
  """Bucket of each (target, source) distance, int32 [t, s] (T5, arXiv 1910.10683, 2.1).

  Half of the buckets hold exact distances, the other half grow logarithmically up to
  max_distance; with `bidirectional` the sign takes one bit.
  """
  distance = np.arange(source_length)[None, :] - np.arange(target_length)[:, None]
  buckets = np.zeros_like(distance)
  if bidirectional:
    num_buckets //= 2
    buckets += (distance > 0) * num_buckets
    distance = np.abs(distance)
  else:
    distance = -np.minimum(distance, 0)
  exact = num_buckets // 2
  ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
  ratio = ratio / np.float32(math.log(max_distance / exact))
  large = exact + (ratio * np.float32(num_buckets - exact)).astype(np.int64)
  buckets += np.where(distance < exact, distance, np.minimum(large, num_buckets - 1))
  return buckets.astype(np.int32)


def relative_bias(table_bn: jax.Array, buckets_ts: np.ndarray) -> jax.Array:
  """Looks up the bias of each head, [n, t, s], by a one-hot product (its gradient is a matmul)."""
  onehot = jax.nn.one_hot(buckets_ts, table_bn.shape[0], dtype=table_bn.dtype)
  return jnp.einsum(
      'tsb,bn->nts', onehot, table_bn, precision=jax.lax.Precision.HIGHEST
  )


def mask_bias(
    source_mask_bs: jax.Array | None, target_length: int, *, causal: bool
) -> jax.Array | None:
  """0 where attention may look and MASKED elsewhere, float32, broadcastable to [b, n, t, s]."""
  bias = None
  if source_mask_bs is not None:
    bias = jnp.where(source_mask_bs, 0.0, MASKED)[:, None, None, :]
  if causal:
    future = np.triu(np.full((target_length, target_length), MASKED, np.float32), 1)
    causal_bias = jnp.asarray(future)[None, None]
    if bias is None:
      return causal_bias
    bias = jnp.maximum(
        jnp.broadcast_to(bias, (*bias.shape[:2], target_length, bias.shape[-1])) +
        jnp.broadcast_to(causal_bias, (bias.shape[0], 1, target_length, target_length)),
        MASKED,
    )
  return bias


def attend(
    params: Mapping[str, jax.Array],
    x_btd: jax.Array,
    source_bsd: jax.Array,
    bias_bnts: jax.Array | None,
    dropout=None,
) -> jax.Array:
  """softmax(q k^T + bias) v over heads, with projections q, k, v [d, n, h] and o [n, h, d].

  Scores are not divided by sqrt(h): T5 folds that into its initialisation. `bias_bnts` float32
  broadcasts over the scores; `dropout` is applied to the attention weights.
  """
  q_btnh = linear(x_btd, params['q'])
  k_bsnh = linear(source_bsd, params['k'])
  v_bsnh = linear(source_bsd, params['v'])
  return mix(params, q_btnh, k_bsnh, v_bsnh, bias_bnts, dropout)


def mix(
    params: Mapping[str, jax.Array],
    q_btnh: jax.Array,
    k_bsnh: jax.Array,
    v_bsnh: jax.Array,
    bias_bnts: jax.Array | None,
    dropout=None,
) -> jax.Array:
  """`attend` from queries, keys and values on."""
  dtype = q_btnh.dtype
  scores = jnp.einsum('btnh,bsnh->bnts', q_btnh, k_bsnh, preferred_element_type=jnp.float32)
  if bias_bnts is not None:
    scores += jnp.broadcast_to(bias_bnts, scores.shape)
  probs = jax.nn.softmax(scores, axis=-1).astype(dtype)
  if dropout is not None:
    probs = dropout(probs)
  mixed_btnh = jnp.einsum('bnts,bsnh->btnh', probs, v_bsnh)
  return linear(mixed_btnh, params['o'], contract=2)
