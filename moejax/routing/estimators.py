"""Other estimators of the router's gradient, to choose from and to compare SparseMixer with.

Notation: z logits, p = softmax(z), D the chosen expert, E_i the experts' outputs, f the loss as a
function of the layer's output p_D E_D, and f' its gradient there.

The dense ones (straight-through, ReinMax, DenseMixer) evaluate every expert in training: their
Routing has e columns, the choices first, and gate 0 for the others. So the forward pass is the
sparse one, and only the logits learn from the experts that were not chosen. In evaluation they
have k columns.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.routing import draws as draws_lib
from moejax.routing import gradients, sparsemixer, topk
from moejax.routing import stages as stages_lib
from moejax.routing.assemble import assemble
from moejax.routing.types import Routing


def sampled_gating(
    logits_bte: jax.Array,
    k: int,
    *,
    eps: float | None = None,
    variant: str = 'reference',
    key: jax.Array | None = None,
    draws: draws_lib.Draws | None = None,
    capacity: int | None = None,
    valid_bt: jax.Array | None = None,
    groups: int = 1,
) -> Routing:
  """Samples as SparseMixer-v2 does and differentiates the gate alone: f'.E_D dp_D/dz.

  That is Euler's first-order rule, SparseMixer-v2 with every scale c = 1 (arXiv 2409.12136).

  Args:
    logits_bte: float32 router logits.
    k: choices a token, drawn one after the other without replacement.
    eps, variant: the candidates, see `stages.candidates`; None samples among all experts.
    key, draws: as `sparsemixer.route`.
    capacity, valid_bt, groups: see `assemble`.

  Raises:
    UserError: draws of another shape; k not between 1 and the number of experts.
  """
  return sparsemixer.route(
      logits_bte, k, version='sampled_gating', eps=eps, variant=variant, key=key, draws=draws,
      capacity=capacity, valid_bt=valid_bt, groups=groups,
  )


def _order(steps: list[stages_lib.Stage], num_experts: int) -> jax.Array:
  """All experts of each token, the chosen ones first in order of choice, int32 [m, e]."""
  rank_me = jnp.broadcast_to(jnp.arange(num_experts), steps[0].keep_me.shape)
  for i, step in enumerate(steps):
    taken_me = jax.nn.one_hot(step.choice_m, num_experts, dtype=bool)
    rank_me = jnp.where(taken_me, i - len(steps), rank_me)
  return jnp.argsort(rank_me, axis=-1).astype(jnp.int32)


def _dense(
    logits_bte: jax.Array, steps: list[stages_lib.Stage], carrier_me: jax.Array,
    limits: dict[str, Any],
) -> Routing:
  """Every expert as a column: the chosen ones have their gates, all of them the carrier's slope."""
  num_experts, k = logits_bte.shape[-1], len(steps)
  gate_me = jnp.zeros_like(carrier_me)
  for step in steps:
    onehot_me = jax.nn.one_hot(step.choice_m, num_experts, dtype=gate_me.dtype)
    gate_me = gate_me + onehot_me * step.probs_me
  gate_me = gradients.replace_gradient(gate_me, carrier_me)
  choice_me = _order(steps, num_experts)
  counts_mk = stages_lib.candidate_counts(steps)
  return assemble(
      logits_bte, choice_me, jnp.take_along_axis(gate_me, choice_me, axis=-1), picks=k,
      candidates_mk=jnp.pad(counts_mk, ((0, 0), (0, num_experts - k))), **limits,
  )


def _dense_sampled(
    logits_bte: jax.Array,
    k: int,
    slope: Callable[[stages_lib.Stage, jax.Array], jax.Array],
    key: jax.Array | None,
    draws: draws_lib.Draws | None,
    **limits: Any,
) -> Routing:
  """Samples and has each stage add probs * slope(stage, logits) to every expert's gate."""
  logits_me = logits_bte.reshape(-1, logits_bte.shape[-1])
  draws = draws_lib.resolve(key, draws, k, logits_me)
  if draws is None:
    return sampled_gating(logits_bte, k, **limits)
  steps = stages_lib.choose(logits_me, k, draws=draws)
  carrier_me = jnp.zeros_like(logits_me)
  for step in steps:
    carrier_me += step.probs_me * slope(step, logits_me)
  return _dense(logits_bte, steps, carrier_me, limits)


def straight_through(
    logits_bte: jax.Array,
    k: int,
    *,
    key: jax.Array | None = None,
    draws: draws_lib.Draws | None = None,
    capacity: int | None = None,
    valid_bt: jax.Array | None = None,
    groups: int = 1,
) -> Routing:
  """Straight-through: the one-hot of D has the gradient of p, sum_i (f'.p_i E_i) dp_i/dz.

  First order, dense (arXiv 1308.3432; as used for routers in arXiv 2304.08612). The gate itself is
  held constant. With several choices each stage adds its own term.

  Args:
    logits_bte: float32 router logits.
    k: choices a token, drawn one after the other without replacement from all experts.
    key, draws: as `sparsemixer.route`; without them the k best are taken, with plain gates.
    capacity, valid_bt, groups: see `assemble`.

  Raises:
    UserError: draws of another shape; k not between 1 and the number of experts.
  """

  def slope(step, logits_me):
    return gradients.slope(step.probs_me, logits_me)

  return _dense_sampled(
      logits_bte, k, slope, key, draws, capacity=capacity, valid_bt=valid_bt, groups=groups
  )


def reinmax(
    logits_bte: jax.Array,
    k: int,
    *,
    key: jax.Array | None = None,
    draws: draws_lib.Draws | None = None,
    capacity: int | None = None,
    valid_bt: jax.Array | None = None,
    groups: int = 1,
) -> Routing:
  """ReinMax, the second-order straight-through estimator (arXiv 2304.08612, Alg. 2); dense.

  With q = (p + onehot(D)) / 2 and w_i = f'.p_i E_i the logits get
  w^T [2 (diag(q) - q q^T) - 1/2 (diag(p) - p p^T)], Heun's trapezoid: exact for quadratic f.

  Args:
    logits_bte: float32 router logits.
    k: choices a token, drawn one after the other without replacement from all experts.
    key, draws: as `sparsemixer.route`; without them the k best are taken, with plain gates.
    capacity, valid_bt, groups: see `assemble`.

  Raises:
    UserError: draws of another shape; k not between 1 and the number of experts.
  """

  def slope(step, logits_me):
    onehot_me = jax.nn.one_hot(step.choice_m, logits_me.shape[-1], dtype=logits_me.dtype)
    middle_me = (step.probs_me + onehot_me) / 2
    slope_me = 2 * gradients.slope(middle_me, logits_me)
    return slope_me - gradients.slope(step.probs_me, logits_me) / 2

  return _dense_sampled(
      logits_bte, k, slope, key, draws, capacity=capacity, valid_bt=valid_bt, groups=groups
  )


def reinforce(
    logits_bte: jax.Array,
    k: int,
    *,
    key: jax.Array | None = None,
    draws: draws_lib.Draws | None = None,
    capacity: int | None = None,
    valid_bt: jax.Array | None = None,
    groups: int = 1,
) -> Routing:
  """REINFORCE: gates without gradient, and log_prob_m for `surrogate_loss`; unbiased.

  Args:
    logits_bte: float32 router logits.
    k: choices a token, drawn one after the other without replacement from all experts;
      log_prob_m is the log-probability of the whole sequence of draws.
    key, draws: as `sparsemixer.route`; without them the k best are taken, with plain gates, and
      log_prob_m is None.
    capacity, valid_bt, groups: see `assemble`.

  Raises:
    UserError: draws of another shape; k not between 1 and the number of experts.
  """
  logits_me = logits_bte.reshape(-1, logits_bte.shape[-1])
  draws = draws_lib.resolve(key, draws, k, logits_me)
  limits: dict[str, Any] = dict(capacity=capacity, valid_bt=valid_bt, groups=groups)
  if draws is None:
    return sampled_gating(logits_bte, k, **limits)
  steps = stages_lib.choose(logits_me, k, draws=draws)
  gates, log_prob_m = [], jnp.zeros_like(logits_me[:, 0])
  for step in steps:
    gates.append(gradients.pick(step.probs_me, step.choice_m))
    log_probs_me = jax.nn.log_softmax(jnp.where(step.keep_me, logits_me, -jnp.inf), axis=-1)
    log_prob_m += gradients.pick(log_probs_me, step.choice_m)
  return assemble(
      logits_bte, stages_lib.choices(steps), jnp.stack(gates, axis=-1), log_prob_m=log_prob_m,
      candidates_mk=stages_lib.candidate_counts(steps), **limits,
  )


def surrogate_loss(
    log_prob_m: jax.Array,
    loss_m: jax.Array,
    baseline_m: jax.Array | float = 0.0,
    weight_m: jax.Array | None = None,
) -> jax.Array:
  """A scalar whose gradient is REINFORCE's, mean over tokens of (loss - baseline) dlog P/dz.

  Add it to the loss: its value is of no use and its gradient reaches the log-probabilities only.
  A baseline that does not depend on the token's own draws changes no mean, only the variance.

  Args:
    log_prob_m: `Routing.log_prob_m`.
    loss_m: loss of each token, no gradient is taken of it.
    baseline_m: subtracted from it.
    weight_m: 1 for tokens, 0 for padding; None: all count.
  """
  gain_m = jax.lax.stop_gradient(loss_m - baseline_m)
  weight_m = jnp.ones_like(log_prob_m) if weight_m is None else weight_m.astype(log_prob_m.dtype)
  return jnp.sum(weight_m * gain_m * log_prob_m) / jnp.maximum(weight_m.sum(), 1.0)


def densemixer(
    logits_bte: jax.Array,
    k: int,
    *,
    normalize: bool = False,
    dense: bool = True,
    capacity: int | None = None,
    valid_bt: jax.Array | None = None,
    groups: int = 1,
) -> Routing:
  """DenseMixer (Yao et al. 2025): top-k forward, as if all gates were used backward.

  The choice of the top k is passed straight through, so the logits get sum_i (f'.E_i) dp_i/dz over
  all experts; nothing is sampled.

  Args:
    logits_bte: float32 router logits.
    k: choices a token.
    normalize: gates are divided by the sum of the k chosen; for the experts not chosen that sum
      is a constant, as in the released code.
    dense: False evaluates and differentiates the k chosen experts only.
    capacity, valid_bt, groups: see `assemble`.
  """
  num_experts = logits_bte.shape[-1]
  limits: dict[str, Any] = dict(capacity=capacity, valid_bt=valid_bt, groups=groups)
  if not dense:
    return topk.route(logits_bte, k, normalize=normalize, **limits)
  choice_me, carrier_me, probs_me = topk.gates(logits_bte.reshape(-1, num_experts), num_experts)
  if normalize:
    total_m1 = carrier_me[:, :k].sum(-1, keepdims=True)
    carrier_me = jnp.concatenate([
        carrier_me[:, :k] / total_m1, carrier_me[:, k:] / jax.lax.stop_gradient(total_m1)
    ], axis=-1)
  picked = jnp.arange(num_experts)[None] < k
  gate_me = gradients.replace_gradient(jnp.where(picked, carrier_me, 0.0), carrier_me)
  return assemble(
      logits_bte, choice_me, gate_me, probs_me=probs_me, picks=k,
      candidates_mk=jnp.where(picked, num_experts, 0) * jnp.ones_like(choice_me), **limits,
  )
