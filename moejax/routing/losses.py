"""Auxiliary losses of routers, float32, as plain functions of logits and choices."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moejax.errors import UserError


def load_balance_loss(
    probs_bte: jax.Array,
    choice: jax.Array,
    weight_bt: jax.Array,
    *,
    chosen: jax.Array | None = None,
    groups: int = 1,
) -> jax.Array:
  """Load-balancing loss, e * sum_e f_e P_e (Switch, arXiv 2101.03961, eq. 4-6, without alpha).

  f_e is the number of choices of expert e per token, whatever place they have: over the experts f
  sums to k, and a balanced router gives k (as Hugging Face counts; dividing by k would give 1).
  P_e is the mean router probability; only P has a gradient. Tokens of weight 0 (padding) count in
  neither. What counts is what the router chose, sampled or not, before any capacity.

  groups 1 is 'global' balance: f and P are over every token of the batch. Under jit on a mesh with
  automatic sharding arrays are global, so this needs no collective of its own and equals what one
  device would compute. groups n is 'local' balance: the mean of the losses that n equal contiguous
  parts of the batch have by themselves, as n devices without communication would compute (GRIN,
  arXiv 2409.12136, 3.3, which prefers global: local asks each part alone for balance).

  Args:
    probs_bte: router probabilities.
    choice: int, experts, [b, t] or [b, t, k].
    weight_bt: 1 for tokens, 0 for padding.
    chosen: bool, the shape of `choice`; False entries are no choices. None: all are.
    groups: parts of the batch.

  Raises:
    UserError: the batch does not divide into the groups.
  """
  batch, num_experts = probs_bte.shape[0], probs_bte.shape[-1]
  if batch % groups:
    raise UserError(f'local balance: batch {batch} does not divide into {groups} groups')
  mask = jax.nn.one_hot(choice, num_experts, dtype=probs_bte.dtype)
  if chosen is not None:
    mask = mask * chosen[..., None].astype(mask.dtype)
  if choice.ndim == 3:
    mask = mask.sum(axis=2)
  mask_bte = mask * weight_bt[..., None]
  probs_bte = probs_bte * weight_bt[..., None]

  def loss(mask_bte, probs_bte, weight_bt):
    tokens = jnp.maximum(weight_bt.sum(), 1.0)
    share = mask_bte.sum((0, 1)) / tokens
    mean_prob = probs_bte.sum((0, 1)) / tokens
    return num_experts * (share * mean_prob).sum()

  if groups == 1:
    return loss(mask_bte, probs_bte, weight_bt)
  part = lambda a: a.reshape(groups, batch // groups, *a.shape[1:])
  return jax.vmap(loss)(part(mask_bte), part(probs_bte), part(weight_bt)).mean()


def pooled_load_balance_loss(
    logits: Sequence[jax.Array],
    k: int,
    mask: jax.Array | Sequence[jax.Array | None] | None = None,
) -> jax.Array:
  """'pooled' balance: one loss over all layers as if their tokens were one layer's.

  e * sum_e f_e P_e as Hugging Face's decoders compute it (`load_balancing_loss_func`): f counts
  the plain k most probable experts of the softmax, whatever the router sampled; f and P are means
  over the tokens of all layers together. f sums to k, so a balanced router gives k.

  Args:
    logits: router logits of each layer, [m, e] with the same e.
    k: choices counted a token.
    mask: [m] attention mask, 1 for tokens and 0 for padding, one for all layers or one a layer.

  Raises:
    UserError: no layers, or masks for another number of layers.
  """
  layers = len(logits)
  masks = list(mask) if isinstance(mask, (list, tuple)) else [mask] * layers
  if not layers or len(masks) != layers:
    raise UserError(f'pooled balance: {layers} layers of logits and {len(masks)} masks')
  num_experts, dtype = logits[0].shape[-1], jnp.promote_types(logits[0].dtype, jnp.float32)
  counts, probs, tokens = jnp.zeros(num_experts, dtype), jnp.zeros(num_experts, dtype), 0.0
  for logits_me, weight_m in zip(logits, masks):
    probs_me = jax.nn.softmax(logits_me.astype(dtype), axis=-1)
    _, choice_mk = jax.lax.top_k(probs_me, k)
    if weight_m is None:
      weight_m = jnp.ones(logits_me.shape[0])
    weight_m = weight_m.astype(dtype)
    chosen_me = jax.nn.one_hot(choice_mk, num_experts, dtype=dtype).sum(1)
    counts += weight_m @ chosen_me
    probs += weight_m @ probs_me
    tokens += weight_m.sum()
  tokens = jnp.maximum(tokens, 1.0)
  return num_experts * ((counts / tokens) * (probs / tokens)).sum()


def z_loss(logits_bte: jax.Array, weight_bt: jax.Array) -> jax.Array:
  """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5)."""
  log_z_bt = jax.nn.logsumexp(logits_bte, axis=-1)
  return (log_z_bt**2 * weight_bt).sum() / jnp.maximum(weight_bt.sum(), 1.0)
