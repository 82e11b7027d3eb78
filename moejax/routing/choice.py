"""Which experts of a split layer a token runs: scores from small routers, and rules over scores.

A feed-forward layer cut into experts of its own neurons needs no gates: an expert runs or does not,
so a choice is a mask. Routers are those of MoEfication (arXiv 2110.01786), D2DMoE (2310.04361),
CMoE (2502.04416) and EMoE (2310.10908); rules are a fixed number, D2DMoE's two of dynamic k, and a
threshold. Scores are float32 [m, e], masks are bool [m, e].
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moejax.errors import UserError, did_you_mean

KINDS = {
    'linear': ('kernel',), 'unit_linear': ('kernel',), 'mlp': ('kernel', 'out'),
    'norm': ('kernel', 'bias', 'out', 'out_bias'), 'swiglu': ('kernel', 'up'),
}


def scores(params: Mapping[str, Any], x_md: jax.Array, kind: str) -> jax.Array:
  """How much each expert is wanted, float32 [m, e], whatever the dtype of x and the weights.

  Args:
    params: kernel [d, e], and bias [e] where there is one, for all but 'mlp' and 'norm'.
    kind: 'linear', x kernel + bias. 'unit_linear', the same of x / |x|, where a token of zeros
      stays zero. 'mlp' (MoEfication), out^T tanh(kernel^T x / |x|) of kernel [d, h], out [h, e].
      'norm' (D2DMoE), |out^T relu(kernel^T x + bias) + out_bias| of kernel [d, h], bias [h],
      out [h, e], out_bias [e]. 'swiglu' (CMoE), |silu(x kernel) * (x up)| of one neuron an expert,
      kernel and up [d, e].

  Raises:
    UserError: an unknown kind, or parameters that lack a part.
  """
  if kind not in KINDS:
    raise UserError(f'kind = {kind!r}: one of {tuple(KINDS)}{did_you_mean(kind, KINDS)}')
  if missing := [name for name in KINDS[kind] if name not in params]:
    raise UserError(f'a router of kind {kind!r} needs {KINDS[kind]}; {missing} are not there')
  p = {name: jnp.asarray(a, jnp.float32) for name, a in params.items()}
  x = jnp.asarray(x_md, jnp.float32)
  if kind in ('unit_linear', 'mlp'):
    x = unit(x)
  y = _product(x, p['kernel'])
  if kind == 'mlp':
    return _product(jnp.tanh(y), p['out'])
  if kind == 'norm':
    return jnp.abs(_product(jax.nn.relu(y + p['bias'][None]), p['out']) + p['out_bias'][None])
  if kind == 'swiglu':
    return jnp.abs(jax.nn.silu(y) * _product(x, p['up']))
  return y + p['bias'][None] if 'bias' in p else y


def unit(x_md: jax.Array) -> jax.Array:
  """Rows of length 1, float32; rows of zeros stay, and so do their gradients finite."""
  x = x_md.astype(jnp.float32)
  largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
  some = largest > 0
  # Divided first, so that squares neither overflow nor vanish.
  x = jnp.where(some, x / jnp.where(some, largest, 1.0), 0.0)
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  return x / jnp.sqrt(jnp.where(some, square, 1.0))


def top(scores_me: jax.Array, k: int) -> jax.Array:
  """The k experts of highest score; of equal ones, those of lower index.

  Raises:
    UserError: k is not between 1 and the number of experts.
  """
  experts = scores_me.shape[-1]
  if not 1 <= k <= experts:
    raise UserError(f'k = {k} of {experts} experts: between 1 and {experts}')
  if k == experts:
    return jnp.ones(scores_me.shape, bool)
  _, choice_mk = jax.lax.top_k(scores_me, k)
  return _of_ranks(choice_mk, jnp.ones(choice_mk.shape, bool), experts)


def within(
    scores_me: jax.Array, tau: float | jax.Array, limit: int | None = None
) -> jax.Array:
  """D2DMoE's rule: experts whose score is at least (1 - tau) times the token's highest.

  The best expert always runs, and with tau = 1 all do. Where all scores are 0, all experts run.

  Args:
    tau: in [0, 1]. limit: most experts of a token, the best ones; None: all that qualify.
  """
  best_m1 = jnp.max(scores_me, axis=-1, keepdims=True)
  mask = (scores_me >= (1 - tau) * best_m1) | (scores_me == best_m1) | jnp.asarray(tau >= 1)
  return _limited(mask, scores_me, limit)


def cumulative(
    scores_me: jax.Array, tau: float | jax.Array, limit: int | None = None
) -> jax.Array:
  """D2DMoE's other rule: the fewest experts whose shares of all scores together reach tau.

  The expert that crosses tau runs, so one always does; with tau = 1 all do. Scores below 0 count
  as 0. Where all scores are 0, all experts run.

  Args:
    tau: in [0, 1]. limit: most experts of a token, the best ones; None: all that qualify.
  """
  positive = jnp.maximum(scores_me, 0.0)
  total = positive.sum(-1, keepdims=True)
  share_me = positive / jnp.where(total > 0, total, 1.0)
  columns = scores_me.shape[-1] if limit is None else min(limit, scores_me.shape[-1])
  share_mk, choice_mk = jax.lax.top_k(share_me, columns)
  reached_mk = jnp.cumsum(share_mk, axis=-1)
  first_mk = jnp.arange(columns)[None] == 0
  before_mk = jnp.where(first_mk, 0.0, jnp.roll(reached_mk, 1, axis=-1))
  taken_mk = (before_mk < tau) | first_mk | jnp.asarray(tau >= 1) | (total <= 0)
  return _of_ranks(choice_mk, taken_mk, scores_me.shape[-1])


def above(
    scores_me: jax.Array, threshold: float | jax.Array, limit: int | None = None
) -> jax.Array:
  """Experts of a score above the threshold, of a token perhaps none.

  Args:
    limit: most experts of a token, the best ones; None: all that qualify.
  """
  return _limited(scores_me > threshold, scores_me, limit)


RULES: dict[str, Callable[..., jax.Array]] = {
    'top': top, 'within': within, 'cumulative': cumulative, 'above': above,
}


def _limited(mask_me: jax.Array, scores_me: jax.Array, limit: int | None) -> jax.Array:
  if limit is None or limit >= scores_me.shape[-1]:
    return mask_me
  return mask_me & top(scores_me, limit)


def _of_ranks(choice_mk: jax.Array, taken_mk: jax.Array, experts: int) -> jax.Array:
  """The mask [m, e] of the experts that are taken of those listed."""
  rows_m1 = jnp.arange(choice_mk.shape[0])[:, None]
  return jnp.zeros((choice_mk.shape[0], experts), bool).at[rows_m1, choice_mk].set(taken_mk)


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
  return jnp.matmul(x, w, precision='highest')
