"""Router 'selection': a token meets the experts that a score chooses, added up without gates."""

import jax
import jax.numpy as jnp

from moejax.config.selection import SelectionConfig
from moejax.routing import choice
from moejax.routing.assemble import assemble
from moejax.routing.types import Routing


def route(
    config: SelectionConfig, scores_bte: jax.Array, valid_bt: jax.Array | None = None
) -> Routing:
  """Sends each token to the experts that the rule takes, at most `choices`, the best scores first.

  Gates are 1. Ties go to the expert of lower index.

  Args:
    config: of one layer. scores_bte: float32. valid_bt: bool; False tokens go to no expert.

  Returns:
    A Routing of `choices` columns (all experts at most), keep_mk False past each token's set.
  """
  experts = scores_bte.shape[-1]
  scores_me = scores_bte.reshape(-1, experts)
  _, choice_mk = jax.lax.top_k(scores_me, min(config.choices[0], experts))
  chosen_mk = None
  if config.rule != 'top':
    chosen_me = choice.RULES[config.rule](scores_me, config.tau[0])
    chosen_mk = jnp.take_along_axis(chosen_me, choice_mk, axis=-1)
  return assemble(
      scores_bte, choice_mk.astype(jnp.int32), jnp.ones(choice_mk.shape, scores_bte.dtype),
      chosen_mk=chosen_mk, valid_bt=valid_bt, balanced=1,
  )
