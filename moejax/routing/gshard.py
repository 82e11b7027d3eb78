"""The GShard router: two experts, the second one by chance (arXiv 2006.16668, Alg. 1)."""

import jax
import jax.numpy as jnp

from moejax.routing import draws as draws_lib
from moejax.routing import topk
from moejax.routing.assemble import assemble
from moejax.routing.types import Routing


def route(
    logits_bte: jax.Array,
    *,
    key: jax.Array | None = None,
    draws: draws_lib.Draws | None = None,
    capacity: int | None = None,
    valid_bt: jax.Array | None = None,
    groups: int = 1,
) -> Routing:
  """Sends each token to its best expert and, by chance, to its second.

  The gates of the two are normalised to sum to 1. In training the second choice is sent where
  2 * g2 > u, so with probability min(2 * g2, 1); the first keeps its gate if it is not. Without
  a key or draws both are always sent. A second choice that is not sent takes no place of the
  capacity, and the balance loss counts both choices where they are sent; Alg. 1 gives it a place
  and balances first choices only.

  Args:
    logits_bte: float32 router logits, at least two experts.
    key: source of u; None is evaluation.
    draws: recorded draws of two choices, of which uniform[1] is u.
    capacity, valid_bt, groups: see `assemble`.

  Raises:
    UserError: draws of another shape.
  """
  num_experts = logits_bte.shape[-1]
  logits_me = logits_bte.reshape(-1, num_experts)
  choice_mk, gate_mk, probs_me = topk.gates(logits_me, 2, normalize=True)
  draws = draws_lib.resolve(key, draws, 2, logits_me)
  sent_m = jnp.ones(logits_me.shape[0], bool)
  if draws is not None:
    sent_m = 2.0 * gate_mk[:, 1] > draws.uniform[1]
  chosen_mk = jnp.stack([jnp.ones_like(sent_m), sent_m], axis=-1)
  return assemble(
      logits_bte, choice_mk, gate_mk, probs_me=probs_me, chosen_mk=chosen_mk,
      candidates_mk=chosen_mk * jnp.array([[num_experts, num_experts - 1]], jnp.int32),
      capacity=capacity, valid_bt=valid_bt, groups=groups,
  )
