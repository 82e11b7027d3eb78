"""ensemble(model, members): a mixture of experts that predicts as an ensemble of its experts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.model import Model, apply_fn
from moejax.nn import members as members_lib


def ensemble(model: Model, members: int = 2) -> Callable[..., jax.Array]:
  """A function of the model's tokens that gives log-probabilities, float32 [b, t, v].

  E^3 (arXiv 2110.03360): experts are in `members` disjoint sets, each input goes through the model
  once with each, and the mean of the members' probabilities is the prediction. Trained for it with
  `train.members`; of another model a set is half of what a token used to choose among, or less. The
  layers before the first experts are computed for each member too.

  Args:
    members: a divisor of the number of experts, which leaves top_k of them to each.

  Returns:
    f(*tokens, **inputs) as `apply_fn` takes them; inputs are arrays with the batch in front.

  Raises:
    UserError: see `nn.members.with_members`.
  """
  config = members_lib.with_members(model.config, members)

  def run(*tokens: Any, **inputs: Any) -> jax.Array:
    each = lambda a: jnp.repeat(jnp.asarray(a), members, axis=0)
    output = apply_fn(
        config, model.params, *map(each, tokens), **{k: each(a) for k, a in inputs.items()}
    )
    return members_lib.mean_log_probs(output.logits_btv, members)

  return run
