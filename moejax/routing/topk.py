"""The router of Mixtral, OLMoE and Qwen: a softmax over all experts, the k most probable chosen."""

import jax

from moejax.routing.assemble import assemble
from moejax.routing.types import Routing


def gates(
    logits_me: jax.Array, k: int, *, normalize: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The k most probable experts, int32 [m, k], their gates [m, k], and all probabilities [m, e].

  normalize: the gates of a token are divided by their sum.
  """
  probs_me = jax.nn.softmax(logits_me, axis=-1)
  gate_mk, choice_mk = jax.lax.top_k(probs_me, k)
  if normalize:
    gate_mk = gate_mk / gate_mk.sum(-1, keepdims=True)
  return choice_mk.astype('int32'), gate_mk, probs_me


def route(
    logits_bte: jax.Array,
    k: int,
    *,
    normalize: bool = False,
    capacity: int | None = None,
    valid_bt: jax.Array | None = None,
    groups: int = 1,
) -> Routing:
  """Sends each token to its k most probable experts; the gates are those probabilities.

  Args:
    logits_bte: float32 router logits.
    k: choices a token.
    normalize: the gates of a token are divided by their sum.
    capacity, valid_bt, groups: see `assemble`.
  """
  choice_mk, gate_mk, probs_me = gates(
      logits_bte.reshape(-1, logits_bte.shape[-1]), k, normalize=normalize
  )
  return assemble(
      logits_bte, choice_mk, gate_mk, probs_me=probs_me, capacity=capacity, valid_bt=valid_bt,
      groups=groups,
  )
