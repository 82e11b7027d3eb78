"""The Switch router: one expert a token (arXiv 2101.03961, section 2)."""

import jax
import jax.numpy as jnp

from moejax.routing.assemble import assemble
from moejax.routing.types import Routing


def route(
    logits_bte: jax.Array,
    *,
    capacity: int | None = None,
    valid_bt: jax.Array | None = None,
    groups: int = 1,
) -> Routing:
  """Sends each token to its most probable expert; the gate is that probability.

  Args:
    logits_bte: float32 router logits.
    capacity: tokens one expert takes from one sequence; later ones are dropped. None drops none.
    valid_bt: bool; False tokens (padding) go to no expert and count in no loss. None: all are.
    groups: parts of the batch that are balanced one by one.
  """
  num_experts = logits_bte.shape[-1]
  probs_me = jax.nn.softmax(logits_bte, axis=-1).reshape(-1, num_experts)
  choice_m = jnp.argmax(logits_bte, axis=-1).astype(jnp.int32).reshape(-1)
  return assemble(
      logits_bte, choice_m[:, None], probs_me.max(axis=-1)[:, None], probs_me=probs_me,
      capacity=capacity, valid_bt=valid_bt, groups=groups,
  )
