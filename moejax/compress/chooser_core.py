"""Routers of split layers without training, and the scores that the best router would give.

MoEfication (arXiv 2110.01786) compares tokens with the mean of an expert's neurons; EMoE
(2310.10908) takes the mean of its gates, CMoE (2502.04416) one neuron of it. What routers are
measured by, and trained on, comes from the activations: their mass in each expert, the length of
its output (D2DMoE, 2310.04361), or how far they are from their means (G-MoEfication), which then
stand in for the experts that do not run. Labels are the expert of each neuron, int32 [f].
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import UserError, did_you_mean
from moejax.routing import choice

Router = dict[str, np.ndarray]
FORMS = ('relu', 'abs', 'square')


def centres(wi_df: np.ndarray, labels_f: np.ndarray, normalise: bool = True) -> np.ndarray:
  """The mean of each expert's neurons, float32 [e, d].

  Args:
    wi_df: the weights by which neurons are told apart: wi, or gate of a gated layer.
    normalise: neurons have length 1 before the mean; the means are not made so again.
  """
  rows = np.asarray(wi_df, np.float32).T.astype(np.float64)
  if normalise:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(length > 0, length, 1.0)
  return _means(rows, labels_f).astype(np.float32)


def cosine(centres_ed: np.ndarray) -> Router:
  """The cosine of token and centre, as in the paper; for 'unit_linear'."""
  wide = np.asarray(centres_ed, np.float64)
  length = np.linalg.norm(wide, axis=1, keepdims=True)
  return {'kernel': (wide / np.where(length > 0, length, 1.0)).T.astype(np.float32)}


def published_euclid(centres_ed: np.ndarray) -> Router:
  """The order of -|x / |x| - centre|, as in the public code; for 'unit_linear'.

  Scores s are not the distances: these are sqrt(1 - 2 s).
  """
  wide = np.asarray(centres_ed, np.float64)
  return {
      'kernel': wide.T.astype(np.float32), 'bias': (-(wide**2).sum(1) / 2).astype(np.float32)
  }


def average_gate(
    gate_df: np.ndarray, labels_f: np.ndarray, gate_bias_f: np.ndarray | None = None
) -> Router:
  """EMoE's avg-k: the mean of each expert's gates before the activation; for 'linear'."""
  router = {'kernel': centres(gate_df, labels_f, normalise=False).T}
  if gate_bias_f is not None:
    router['bias'] = _means(np.asarray(gate_bias_f, np.float64)[:, None], labels_f)[:, 0].astype(
        np.float32
    )
  return router


def representatives(
    gate_df: np.ndarray, wi_df: np.ndarray, neuron_e: np.ndarray, normalise: bool = True
) -> Router:
  """CMoE's router: one neuron of each expert, of length 1 unless told otherwise; for 'swiglu'."""
  def columns(w_df):
    rows = np.asarray(w_df, np.float32).T[np.asarray(neuron_e)].astype(np.float64)
    length = np.linalg.norm(rows, axis=1, keepdims=True) if normalise else 1.0
    return (rows / np.where(length > 0, length, 1.0)).T.astype(np.float32)

  return {'kernel': columns(gate_df), 'up': columns(wi_df)}


def activation_mass(
    hidden_mf: jax.Array, labels_f: jax.Array, experts: int, form: str = 'relu'
) -> jax.Array:
  """Activations summed over the neurons of each expert, float32 [m, e].

  Args:
    hidden_mf: what wo multiplies. form: 'relu', the sum of what is above 0, MoEfication's; 'abs' or
      'square', for smooth or gated layers, where activations below 0 count too.

  Raises:
    UserError: an unknown form.
  """
  if form not in FORMS:
    raise UserError(f'form = {form!r}: one of {FORMS}{did_you_mean(form, FORMS)}')
  return _mass(hidden_mf, labels_f, experts, form)


@functools.partial(jax.jit, static_argnames=('experts', 'form'))
def _mass(hidden_mf, labels_f, experts, form):
  h = jnp.asarray(hidden_mf, jnp.float32)
  h = {'relu': jax.nn.relu, 'abs': jnp.abs, 'square': jnp.square}[form](h)
  own_fe = jax.nn.one_hot(labels_f, experts, dtype=jnp.float32)
  return jnp.matmul(h, own_fe, precision='highest')


def deviation_mass(
    hidden_mf: jax.Array, mean_f: jax.Array, labels_f: jax.Array, experts: int,
    form: str = 'square',
) -> jax.Array:
  """G-MoEfication's scores: how far activations are from their means, float32 [m, e].

  Args:
    mean_f: over the data. form: 'square' or 'abs', as in `activation_mass`.

  Raises:
    UserError: another form.
  """
  if form == 'relu':
    raise UserError("form = 'relu': deviations have either sign; take 'square' or 'abs'")
  away = jnp.asarray(hidden_mf, jnp.float32) - jnp.asarray(mean_f, jnp.float32)[None]
  return activation_mass(away, labels_f, experts, form)


def output_factors(wo_fd: np.ndarray, labels_f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """What `norms_by_factors` needs of the output weights, made once for all pieces of the tokens.

  wo of an expert is R^T Q^T with Q's columns orthonormal: |h wo| = |h R^T|, with s columns in the
  place of d. Experts may differ in size; the rows that a smaller one lacks are zero.

  Returns:
    (neurons int32 [e, s], factor float32 [e, s, min(s, d)]).
  """
  wo, labels = np.asarray(wo_fd, np.float32), np.asarray(labels_f)
  sizes = np.bincount(labels)
  place = np.arange(sizes.max())[None] < sizes[:, None]
  neurons = np.zeros(place.shape, np.int32)
  neurons[place] = np.argsort(labels, kind='stable')
  rows_esd = (wo[neurons] * place[..., None]).astype(np.float64)
  upper_ers = np.linalg.qr(rows_esd.swapaxes(1, 2), mode='r')
  return neurons, np.asarray(upper_ers, np.float32).swapaxes(1, 2)


@jax.jit
def norms_by_factors(
    hidden_mf: jax.Array, neurons_es: jax.Array, factor_esr: jax.Array
) -> jax.Array:
  """Lengths of the experts' outputs, float32 [m, e], from `output_factors`."""
  h_fm = jnp.asarray(hidden_mf, jnp.float32).T

  def one(expert):
    neurons, factor = expert
    return jnp.linalg.norm(jnp.matmul(factor.T, h_fm[neurons], precision='highest'), axis=0)

  return jax.lax.map(one, (neurons_es, factor_esr)).T


def output_norms(hidden_mf: jax.Array, wo_fd: np.ndarray, labels_f: np.ndarray) -> jax.Array:
  """|E_e(x)|_2 without the output's bias, float32 [m, e]: what D2DMoE's router predicts."""
  return norms_by_factors(hidden_mf, *output_factors(wo_fd, labels_f))


def mass_recall(
    scores_me: jax.typing.ArrayLike, mass_me: jax.typing.ArrayLike, k: int
) -> float:
  """The part of a token's mass that its k experts of highest score hold, a mean over tokens.

  Tokens without mass in any expert do not count; 1.0 where no token does.

  Raises:
    UserError: k is not between 1 and the number of experts.
  """
  return float(_recall(scores_me, mass_me, k))


@functools.partial(jax.jit, static_argnames=('k',))
def _recall(scores_me, mass_me, k):
  mass = jnp.asarray(mass_me, jnp.float32)
  held_m = jnp.where(choice.top(jnp.asarray(scores_me, jnp.float32), k), mass, 0.0).sum(-1)
  counts_m = jnp.max(mass, axis=-1) > 0
  share_m = jnp.where(counts_m, held_m / jnp.where(counts_m, mass.sum(-1), 1.0), 0.0)
  tokens = counts_m.sum()
  return jnp.where(tokens > 0, share_m.sum() / jnp.maximum(tokens, 1), 1.0)


def mean_fill(wo_fd: np.ndarray, mean_hidden_f: np.ndarray, labels_f: np.ndarray) -> np.ndarray:
  """What each expert puts out at its mean activations, float32 [e, d] (G-MoEfication).

  Added for the experts that do not run. It helps smooth activations; with ReLU nothing is better.
  """
  parts = np.asarray(wo_fd, np.float64) * np.asarray(mean_hidden_f, np.float64)[:, None]
  return _sums(parts, labels_f).astype(np.float32)


def _sums(rows_fn: np.ndarray, labels_f: np.ndarray) -> np.ndarray:
  labels = np.asarray(labels_f)
  out = np.zeros((labels.max() + 1, rows_fn.shape[1]))
  np.add.at(out, labels, rows_fn)
  return out


def _means(rows_fn: np.ndarray, labels_f: np.ndarray) -> np.ndarray:
  return _sums(rows_fn, labels_f) / np.maximum(np.bincount(labels_f), 1)[:, None]
