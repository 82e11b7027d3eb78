"""What every router returns."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
  """Where each token goes, with what weight, and what that costs.

  choice_mk: int32, the experts of each token, first choices first. keep_mk: bool, False where
  capacity, padding or the router itself drops the choice. gate_mk: float32, the factor on the
  expert's output, 0 where dropped. logits_me: float32 router logits before any masking. load_e:
  int32, kept choices of each expert. load_balance_loss, z_loss: float32 scalars, not yet
  multiplied by their coefficients. (All floats are float64 where the logits are.)

  Some routers also say:
  scale_mk: float32, a factor on gate * output in the forward pass only; its gradient passes as if
    it were 1 (SparseMixer's `variant='paper'`).
  candidates_mk: int32, how many experts each choice was made among; 1 leaves nothing to learn, 0
    is no choice: past a threshold's set, left out by GShard's coin, or (dense estimators) an
    expert with gate 0 that is evaluated for its gradient alone and counts in no load. None: each
    choice is among all experts.
  log_prob_m: float32, log-probability of the sampled choices (REINFORCE), 0 for padding.
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

  def kept(self, keep_mk: jax.Array) -> 'Routing':
    """The routing with choices dropped on the way to their experts: in keep_mk and load_e."""
    k = keep_mk.shape[1]
    counted = keep_mk if self.candidates_mk is None else keep_mk & (self.candidates_mk > 0)
    load_e = jnp.zeros_like(self.load_e).at[self.choice_mk[:, :k]].add(counted.astype(jnp.int32))
    return dataclasses.replace(self, keep_mk=keep_mk, load_e=load_e)
