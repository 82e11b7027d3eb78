"""SparseMixer v1, v2 and v2*: sampled experts, and a router gradient that needs no others.

v1: arXiv 2310.00811. v2 (which trained GRIN) and v2*: arXiv 2409.12136, section 2 and appendix A.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import UserError
from moejax.routing import draws as draws_lib
from moejax.routing import gradients
from moejax.routing import stages as stages_lib
from moejax.routing.assemble import assemble
from moejax.routing.types import Routing


@dataclasses.dataclass(frozen=True)
class Rule:
  """How the difference f(p E) - f(0) is read off one evaluation of f' at c p E.

  The scale c of a sampled expert is 1 with probability `full`, else `node`; `weight` multiplies
  the gradient of the probabilities softmax(logits / temperature).
  """

  node: float
  full: float
  weight: float
  temperature: float = 1.0


# v1: gating term and mid-point rule together. v2: Heun's third-order rule for a gate held
# constant, nodes 1/3 and 1 with weights 3/4 and 1/4. v2*: gating term and Heun's rule,
# 2 (5/8 f'(h) + 3/8 f'(h/3)); its temperature 2 cancels the 2. sampled_gating: Euler's rule.
RULES = {
    'sparsemixer_v1': Rule(node=1 / 2, full=1 / 2, weight=2.0),
    'sparsemixer_v2': Rule(node=1 / 3, full=1 / 4, weight=1.0),
    'sparsemixer_v2_star': Rule(node=1 / 3, full=5 / 8, weight=2.0, temperature=2.0),
    'sampled_gating': Rule(node=1.0, full=1.0, weight=1.0),
}
# The released code writes 1/3 as 0.3333 and computes in float32.
RELEASED_THIRD = float(np.float32(0.3333))


class Gates(NamedTuple):
  """choice_mk: int32. gate_mk: float. scale_mk: float or None. stages: what was drawn from what."""

  choice_mk: jax.Array
  gate_mk: jax.Array
  scale_mk: jax.Array | None
  stages: list[stages_lib.Stage]


def _scale(
    rule: Rule, stage: stages_lib.Stage, uniform_m: jax.Array, best_m: jax.Array, variant: str,
    euler_on_argmax: bool,
) -> jax.Array:
  """c of each token: 1 or the rule's inner node."""
  node = RELEASED_THIRD if variant == 'reference' and rule.node == 1 / 3 else rule.node
  full_m = uniform_m > 1 - rule.full
  if euler_on_argmax:
    full_m = full_m | (stage.choice_m == best_m)
  return jnp.where(full_m, 1.0, node).astype(stage.probs_me.dtype)


def gates(
    logits_me: jax.Array,
    k: int,
    *,
    version: str = 'sparsemixer_v2',
    eps: float | None = 0.01,
    variant: str = 'reference',
    euler_on_argmax: bool = True,
    draws: draws_lib.Draws | None = None,
) -> Gates:
  """Chooses k experts a token in k stages, and gives each a gate with an estimated gradient.

  In stage i an expert s is drawn from p, the softmax over the candidates among the experts not
  yet taken (see `stages`), and contributes c p_s E_s. Of the cotangent g of the gate the logits
  get g * weight * dp_s/dz, without c: the factor c sits only in the point where g is evaluated.
  Gates of different stages do not sum to 1. Without draws the best candidates are taken, c = 1,
  and the gradient is the plain one of p_s.

  Args:
    logits_me: float router logits z.
    k: choices a token; v1 makes one.
    version: a key of RULES.
    eps: width of the candidate band; None makes every expert a candidate.
    variant: 'reference' is the released code: the gate is c p_s, so the expert's gradient is
      scaled by c too; 1/3 is float32(0.3333). 'paper': the gate is p_s and c is returned as
      scale_mk, to be applied as h + stop_gradient(c h - h) on h = gate * E_s, which leaves the
      expert's gradient unscaled; 1/3 is exact; the candidates are those of eq. 2. (The paper
      writes v2* with 2 h for h, which would double the expert's gradient with the router's; here
      the 2 is on the router's alone, in both variants.)
    euler_on_argmax: c = 1 where the best candidate is drawn, as published. Without it c is drawn
      for every expert, and the rule keeps its order (mid-point exact for quadratic f, Heun for
      cubic).
    draws: random numbers; None is evaluation.

  Raises:
    UserError: v1 with k other than 1, or k not between 1 and the number of experts.
  """
  rule = RULES[version]
  if version == 'sparsemixer_v1' and k != 1:
    raise UserError(f'sparsemixer_v1 chooses one expert a token, not {k}')
  train = draws is not None
  steps = stages_lib.choose(
      logits_me, k, eps=eps, variant=variant, temperature=rule.temperature, draws=draws
  )
  gates_m, scales_m = [], []
  for i, stage in enumerate(steps):
    prob_m = gradients.pick(stage.probs_me, stage.choice_m)
    weight = (rule.weight if train else 1.0) / rule.temperature
    carrier_m = weight * gradients.pick(
        gradients.slope(stage.probs_me, logits_me), stage.choice_m
    )
    value_m = prob_m
    if train:
      # v1 compares with the arg-max of the logits, the later code with that of the probabilities:
      # they differ where two logits round to one probability.
      best_m = stage.best_m if version == 'sparsemixer_v1' else jnp.argmax(stage.probs_me, -1)
      scale_m = _scale(rule, stage, draws.uniform[i], best_m, variant, euler_on_argmax)
      scales_m.append(scale_m)
      if variant == 'reference':
        value_m = prob_m * scale_m
    gates_m.append(gradients.replace_gradient(value_m, carrier_m))
  scaled = train and variant == 'paper'
  return Gates(
      choice_mk=stages_lib.choices(steps), gate_mk=jnp.stack(gates_m, axis=-1),
      scale_mk=jnp.stack(scales_m, axis=-1) if scaled else None, stages=steps,
  )


def route(
    logits_bte: jax.Array,
    k: int,
    *,
    version: str = 'sparsemixer_v2',
    eps: float | None = 0.01,
    variant: str = 'reference',
    euler_on_argmax: bool = True,
    key: jax.Array | None = None,
    draws: draws_lib.Draws | None = None,
    capacity: int | None = None,
    valid_bt: jax.Array | None = None,
    groups: int = 1,
) -> Routing:
  """Routes with SparseMixer; see `gates` for the method and its options.

  The balance loss counts the experts really drawn; its probabilities are the softmax over all
  experts (v2, v2*) or over the candidates (v1, as its code does). v1's output is further
  multiplied by a learned omega of the layer, which is no matter of the router.

  Args:
    logits_bte: float32 router logits.
    k: choices a token.
    key: source of the draws; None, without `draws`, is evaluation: deterministic, c = 1.
    draws: recorded draws of k choices, instead of a key.
    capacity, valid_bt, groups: see `assemble`.

  Raises:
    UserError: as `gates`; draws of another shape.
  """
  logits_me = logits_bte.reshape(-1, logits_bte.shape[-1])
  chosen = gates(
      logits_me, k, version=version, eps=eps, variant=variant, euler_on_argmax=euler_on_argmax,
      draws=draws_lib.resolve(key, draws, k, logits_me),
  )
  probs_me = None
  if version == 'sparsemixer_v1':
    keep_me = chosen.stages[0].keep_me
    probs_me = jax.nn.softmax(jnp.where(keep_me, logits_me, -jnp.inf), axis=-1)
  return assemble(
      logits_bte, chosen.choice_mk, chosen.gate_mk, probs_me=probs_me, scale_mk=chosen.scale_mk,
      candidates_mk=stages_lib.candidate_counts(chosen.stages),
      capacity=capacity, valid_bt=valid_bt, groups=groups,
  )
