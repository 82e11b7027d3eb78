"""How active the hidden units of an FFN are: what regularisers push down (D2DMoE, 2310.04361)."""

import dataclasses

import jax
import jax.numpy as jnp

# What a smooth activation's inputs are pushed towards, far enough below 0 for no output.
FAR_BELOW = -10.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activity:
  """Means over the real tokens of one FFN, float32 scalars.

  active: share of units that are not 0. l1: mean size of a unit. hoyer: square-Hoyer index
  (sum |h|)^2 / sum h^2 over the number of units. above: how far the input of the activation is over
  FAR_BELOW, mean over units.
  """

  active: jax.Array
  l1: jax.Array
  hoyer: jax.Array
  above: jax.Array


FORMS = ('l1', 'hoyer', 'above')


def measure(
    hidden: jax.Array, inputs: jax.Array, valid_bt: jax.Array | None = None
) -> Activity:
  """The activity of an FFN.

  Args:
    hidden: what wo multiplies, [b, t, f]. inputs: of the activation, the same shape. valid_bt:
      bool, True for real tokens; None for all.
  """
  valid = jnp.ones(hidden.shape[:2], bool) if valid_bt is None else valid_bt
  count = jnp.maximum(valid.sum(), 1).astype(jnp.float32)
  mean = lambda of_token_bt: jnp.where(valid, of_token_bt, 0.0).sum() / count
  size = jnp.abs(hidden.astype(jnp.float32))
  largest = jax.lax.stop_gradient(size.max(-1, keepdims=True))
  # Over the largest, so that squares neither overflow nor vanish; of no activation it is 0.
  part = size / jnp.where(largest > 0, largest, 1.0)
  square_bt = jnp.square(part).sum(-1)
  index_bt = jnp.square(part.sum(-1)) / jnp.where(square_bt > 0, square_bt, 1.0)
  above = jax.nn.relu(inputs.astype(jnp.float32) - FAR_BELOW)
  return Activity(
      active=mean((size > 0).mean(-1)), l1=mean(size.mean(-1)),
      hoyer=mean(index_bt) / hidden.shape[-1], above=mean(above.mean(-1)),
  )
