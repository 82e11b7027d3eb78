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

  Some routers also say:
  scale_mk: float32, a factor on gate * output in the forward pass only; its gradient passes as if
    it were 1 (SparseMixer's `variant='paper'`).
  candidates_mk: int32, how many experts each choice was made among; 1 leaves nothing to learn.
  log_prob_m: float32, log-probability of the sampled choices (REINFORCE).
  """

  choice_mk: jax.Array
  keep_mk: jax.Array
  gate_mk: jax.Array
  logits_me: jax.Array
  load_e: jax.Array
  load_balance_loss: jax.Array
  z_loss: jax.Array
  scale_mk: jax.Array | None = None
  candidates_mk: jax.Array | None = None
  log_prob_m: jax.Array | None = None
