"""What every router returns."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
  """Where each token goes, with what weight, and what that costs.

  choice_mk: int32, the experts of each token. keep_mk: bool, False where capacity or padding drops
  the choice. gate_mk: float32, the factor on the expert's output, 0 where dropped. logits_me:
  float32 router logits before any masking. load_e: int32, tokens each expert really processes.
  load_balance_loss, z_loss: float32 scalars, not yet multiplied by their coefficients.
  """

  choice_mk: jax.Array
  keep_mk: jax.Array
  gate_mk: jax.Array
  logits_me: jax.Array
  load_e: jax.Array
  load_balance_loss: jax.Array
  z_loss: jax.Array
