"""The Switch router: one expert a token (arXiv 2101.03961, section 2)."""

import jax
import jax.numpy as jnp

from moejax.routing import losses
from moejax.routing.types import Routing


def capacity_mask(choice_bt: jax.Array, counted_bt: jax.Array, num_experts: int, capacity: int):
  """True where a token is among the first `capacity` of its sequence for its expert, bool [b, t].

  Tokens are served in order of position, as Hugging Face does; tokens not counted take no place.
  """
  onehot_bte = jax.nn.one_hot(choice_bt, num_experts, dtype=jnp.int32) * counted_bt[..., None]
  place_bte = jnp.cumsum(onehot_bte, axis=1)
  place_bt = jnp.take_along_axis(place_bte, choice_bt[..., None], axis=-1)[..., 0]
  return place_bt <= capacity


def route(
    logits_bte: jax.Array,
    *,
    capacity: int | None = None,
    valid_bt: jax.Array | None = None,
) -> Routing:
  """Sends each token to its most probable expert; the gate is that probability.

  Args:
    logits_bte: float32 router logits.
    capacity: tokens one expert takes from one sequence; later ones are dropped. None drops none.
    valid_bt: bool; False tokens (padding) go to no expert and count in no loss. None: all are.
  """
  batch, length, num_experts = logits_bte.shape
  if valid_bt is None:
    valid_bt = jnp.ones((batch, length), bool)
  probs_bte = jax.nn.softmax(logits_bte, axis=-1)
  choice_bt = jnp.argmax(logits_bte, axis=-1).astype(jnp.int32)
  gate_bt = probs_bte.max(axis=-1)
  keep_bt = valid_bt
  if capacity is not None:
    keep_bt = keep_bt & capacity_mask(choice_bt, valid_bt.astype(jnp.int32), num_experts, capacity)
  weight_bt = valid_bt.astype(jnp.float32)
  load_e = jnp.zeros(num_experts, jnp.int32).at[choice_bt].add(keep_bt.astype(jnp.int32))
  m = batch * length
  return Routing(
      choice_mk=choice_bt.reshape(m, 1),
      keep_mk=keep_bt.reshape(m, 1),
      gate_mk=jnp.where(keep_bt, gate_bt, 0.0).reshape(m, 1),
      logits_me=logits_bte.reshape(m, num_experts),
      load_e=load_e,
      load_balance_loss=losses.load_balance_loss(probs_bte, choice_bt, weight_bt),
      z_loss=losses.z_loss(logits_bte, weight_bt),
  )
