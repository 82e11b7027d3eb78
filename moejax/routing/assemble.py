"""From a router's choices and gates to a Routing: padding, capacity, load, losses."""

import jax
import jax.numpy as jnp

from moejax.routing import capacity as capacity_lib
from moejax.routing import losses
from moejax.routing.types import Routing


def assemble(
    logits_bte: jax.Array,
    choice_mk: jax.Array,
    gate_mk: jax.Array,
    *,
    capacity: int | None = None,
    valid_bt: jax.Array | None = None,
    groups: int = 1,
    probs_me: jax.Array | None = None,
    chosen_mk: jax.Array | None = None,
    picks: int | None = None,
    balanced: int | None = None,
    scale_mk: jax.Array | None = None,
    candidates_mk: jax.Array | None = None,
    log_prob_m: jax.Array | None = None,
) -> Routing:
  """Drops padding and what exceeds the capacity, counts the load, computes the losses.

  Args:
    logits_bte: float router logits.
    choice_mk: int32 experts, first choices first.
    gate_mk: their gates.
    capacity: tokens one expert takes from one sequence, see `capacity.mask`; None drops none.
    valid_bt: bool; False tokens (padding) go to no expert and count in no loss. None: all are.
    groups: parts of the batch that are balanced one by one, see `losses.load_balance_loss`.
    probs_me: probabilities of the balance loss; None takes the softmax over all experts.
    chosen_mk: bool, False where the router itself leaves a choice out. None: nowhere.
    picks: how many leading columns are choices; the others are experts evaluated for their
      gradient, which no capacity drops and no load counts. None: all are choices.
    balanced: how many leading columns the balance loss counts; None: all choices.
    scale_mk, candidates_mk, log_prob_m: see Routing.
  """
  batch, length, num_experts = logits_bte.shape
  k = choice_mk.shape[-1]
  picks = k if picks is None else picks
  balanced = picks if balanced is None else balanced
  if valid_bt is None:
    valid_bt = jnp.ones((batch, length), bool)
  if probs_me is None:
    probs_bte = jax.nn.softmax(logits_bte, axis=-1)
  else:
    probs_bte = probs_me.reshape(logits_bte.shape)
  choice_btk = choice_mk.reshape(batch, length, k)
  chosen_btk = None if chosen_mk is None else chosen_mk.reshape(batch, length, k)
  keep_btk = jnp.broadcast_to(valid_bt[..., None], (batch, length, k))
  if chosen_btk is not None:
    keep_btk = keep_btk & chosen_btk
  if capacity is not None:
    fits = capacity_lib.mask(choice_btk[..., :picks], keep_btk[..., :picks], num_experts, capacity)
    fits = jnp.pad(fits, ((0, 0), (0, 0), (0, k - picks)), constant_values=True)
    keep_btk = keep_btk & fits
  keep_mk = keep_btk.reshape(-1, k)
  load_e = jnp.zeros(num_experts, jnp.int32)
  load_e = load_e.at[choice_mk[:, :picks]].add(keep_mk[:, :picks].astype(jnp.int32))
  weight_bt = valid_bt.astype(logits_bte.dtype)
  return Routing(
      choice_mk=choice_mk,
      keep_mk=keep_mk,
      gate_mk=jnp.where(keep_mk, gate_mk, 0.0),
      logits_me=logits_bte.reshape(-1, num_experts),
      load_e=load_e,
      load_balance_loss=losses.load_balance_loss(
          probs_bte, choice_btk[..., :balanced], weight_bt, groups=groups,
          chosen=None if chosen_btk is None else chosen_btk[..., :balanced],
      ),
      z_loss=losses.z_loss(logits_bte, weight_bt),
      scale_mk=scale_mk,
      candidates_mk=candidates_mk,
      log_prob_m=None if log_prob_m is None else jnp.where(valid_bt.reshape(-1), log_prob_m, 0.0),
  )
