"""The router of Mixtral, OLMoE and Qwen: a softmax over all experts, the k most probable chosen."""

import jax
import jax.numpy as jnp

from moejax.routing import losses
from moejax.routing.types import Routing


def route(
    logits_bte: jax.Array,
    k: int,
    *,
    normalize: bool = False,
    valid_bt: jax.Array | None = None,
) -> Routing:
  """Sends each token to its k most probable experts; the gates are those probabilities.

  Args:
    logits_bte: float32 router logits.
    k: choices a token.
    normalize: the gates of a token are divided by their sum.
    valid_bt: bool; False tokens (padding) go to no expert and count in no loss. None: all are.
  """
  batch, length, num_experts = logits_bte.shape
  if valid_bt is None:
    valid_bt = jnp.ones((batch, length), bool)
  probs_bte = jax.nn.softmax(logits_bte, axis=-1)
  gate_btk, choice_btk = jax.lax.top_k(probs_bte, k)
  if normalize:
    gate_btk = gate_btk / gate_btk.sum(-1, keepdims=True)
  m = batch * length
  keep_mk = jnp.broadcast_to(valid_bt.reshape(m, 1), (m, k))
  choice_mk = choice_btk.reshape(m, k).astype(jnp.int32)
  weight_bt = valid_bt.astype(jnp.float32)
  load_e = jnp.zeros(num_experts, jnp.int32).at[choice_mk].add(keep_mk.astype(jnp.int32))
  return Routing(
      choice_mk=choice_mk,
      keep_mk=keep_mk,
      gate_mk=jnp.where(keep_mk, gate_btk.reshape(m, k), 0.0),
      logits_me=logits_bte.reshape(m, num_experts),
      load_e=load_e,
      load_balance_loss=losses.load_balance_loss(probs_bte, choice_btk[..., 0], weight_bt),
      z_loss=losses.z_loss(logits_bte, weight_bt),
  )
