"""The threshold router of XMoE: as many experts as a token needs (arXiv 2403.18926)."""

import jax
import jax.numpy as jnp

from moejax.routing import topk
from moejax.routing.assemble import assemble
from moejax.routing.types import Routing


def route(
    logits_bte: jax.Array,
    threshold: float,
    *,
    limit: int | None = None,
    normalize: bool = False,
    capacity: int | None = None,
    valid_bt: jax.Array | None = None,
    groups: int = 1,
) -> Routing:
  """Sends each token to the fewest experts whose probabilities together reach the threshold.

  The expert of rank i is chosen where those before it sum to less than the threshold, so the first
  always is, and all are at 1. Gates are the probabilities, not renormalised. The balance loss
  counts the first choice alone, as Switch's. An expert that is full drops what comes later in
  order of rank, then position (XMoE's code: rank, then probability).

  Args:
    logits_bte: float32 router logits.
    threshold: probability to be reached, in (0, 1].
    limit: most experts of a token; fixes the number of columns. None: all experts.
    normalize: gates are divided by the sum of the chosen ones.
    capacity, valid_bt, groups: see `assemble`.

  Returns:
    A Routing of min(limit, e) columns, keep_mk False past each token's set.
  """
  num_experts = logits_bte.shape[-1]
  columns = min(limit or num_experts, num_experts)
  logits_me = logits_bte.reshape(-1, num_experts)
  choice_mk, gate_mk, probs_me = topk.gates(logits_me, columns)
  before_mk = jnp.cumsum(gate_mk, axis=-1) - gate_mk
  chosen_mk = before_mk < threshold
  # Rounded sums may reach 1 early; and nothing comes before the first.
  chosen_mk = chosen_mk | (threshold >= 1.0) | (jnp.arange(columns)[None] == 0)
  if normalize:
    gate_mk = gate_mk / jnp.where(chosen_mk, gate_mk, 0.0).sum(-1, keepdims=True)
  return assemble(
      logits_bte, choice_mk, gate_mk, probs_me=probs_me, chosen_mk=chosen_mk, balanced=1,
      candidates_mk=jnp.where(chosen_mk, num_experts, 0).astype(jnp.int32),
      capacity=capacity, valid_bt=valid_bt, groups=groups,
  )
