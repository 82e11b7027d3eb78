"""Auxiliary losses of routers, float32, as plain functions of logits and choices."""

import jax
import jax.numpy as jnp


def load_balance_loss(
    probs_bte: jax.Array, choice_bt: jax.Array, weight_bt: jax.Array
) -> jax.Array:
  """Load-balancing loss, e * sum_e f_e P_e (Switch, arXiv 2101.03961, eq. 4-6, without alpha).

  f_e is the share of tokens whose arg-max is expert e, P_e the mean router probability. Tokens of
  weight 0 (padding) count in neither.
  """
  num_experts = probs_bte.shape[-1]
  mask_bte = jax.nn.one_hot(choice_bt, num_experts, dtype=jnp.float32) * weight_bt[..., None]
  probs_bte = probs_bte * weight_bt[..., None]
  tokens = jnp.maximum(weight_bt.sum(), 1.0)
  share = mask_bte.sum((0, 1)) / tokens
  mean_prob = probs_bte.sum((0, 1)) / tokens
  return num_experts * (share * mean_prob).sum()


def z_loss(logits_bte: jax.Array, weight_bt: jax.Array) -> jax.Array:
  """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5)."""
  log_z_bt = jax.nn.logsumexp(logits_bte, axis=-1)
  return (log_z_bt**2 * weight_bt).sum() / jnp.maximum(weight_bt.sum(), 1.0)
