"""One expert of several: the operators of a merge, on arrays (M-SMoE, arXiv 2310.01334, 3.1).

Experts are a mapping of weights [e, ...], wi and gate [e, d, f], wo [e, f, d] and biases; labels
int32 [e] give each its group. Results are float32 [g, ...] by the same names. Align the experts of
a group before (`align_core`), or their hidden units are averaged in any order.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import UserError

EPS = 1e-7
# ZipIt as MC-SMoE publishes it: a merged unit keeps this share of the lesser correlation.
_ZIP_SHARE = 0.1

Experts = Mapping[str, Any]


def weighted(
    experts: Experts, labels_e: np.ndarray, weights_e: jax.typing.ArrayLike, eps: float = EPS,
    unused: str = 'mean',
) -> dict[str, jax.Array]:
  """Sum of weight * W over a group's experts, over the sum of their weights + eps.

  The operator `frequency` weighs by usage, `uniform` by ones, `reap` by REAP's score. A group
  whose weights add up to 0, as no token chose it, becomes the plain mean of its experts; the
  published code makes it 0, as unused='zero' does.
  """
  labels, count = _labels(labels_e)
  weight = jnp.asarray(weights_e, jnp.float32)
  if unused == 'mean':
    weight = jnp.where(jax.ops.segment_sum(weight, labels, count)[labels] == 0, 1.0, weight)
  total = jax.ops.segment_sum(weight, labels, count)
  return {name: _sums(w, weight, labels, count) / _like(total + eps, w)
          for name, w in experts.items()}


def fisher(
    experts: Experts, labels_e: np.ndarray, information: Experts, eps: float = EPS
) -> dict[str, jax.Array]:
  """Every weight by its own Fisher information (mean squared gradients of the same shapes)."""
  labels, count = _labels(labels_e)
  out = {}
  for name, w in experts.items():
    f = jnp.asarray(information[name], jnp.float32)
    above = jax.ops.segment_sum(f * jnp.asarray(w, jnp.float32), labels, count)
    out[name] = above / (jax.ops.segment_sum(f, labels, count) + eps)
  return out


def pick(experts: Experts, chosen_g: Sequence[int]) -> dict[str, jax.Array]:
  """The chosen experts as they are: what is left of a group whose others are dropped."""
  index = jnp.asarray(chosen_g)
  return {name: jnp.asarray(w)[index].astype(jnp.float32) for name, w in experts.items()}


def solve_wo(
    hidden_mf: jax.typing.ArrayLike, outputs_md: jax.typing.ArrayLike,
    start_fd: jax.typing.ArrayLike, ridge: float = 1.0,
) -> jax.Array:
  """MergeMoE (arXiv 2510.14436): the wo of a merged expert by least squares on its outputs.

  Minimises |hidden wo - outputs|^2 + ridge * f / m * mean diagonal * |wo - start|^2: hidden units
  that no token reaches keep the averaged weights, and the fewer tokens there are for f units, the
  more all do. (Without a ridge the solution fits the calibration and loses the rest: measured.)

  Args:
    hidden_mf: hidden units of the merged expert on the group's tokens. outputs_md: what each
      token's own expert gave. start_fd: averaged wo.
  """
  hidden, start = (jnp.asarray(a, jnp.float32) for a in (hidden_mf, start_fd))
  square = jnp.einsum('mf,mg->fg', hidden, hidden, precision='highest')
  units = len(square)
  weight = ridge * units / hidden.shape[0] * jnp.mean(jnp.diagonal(square)) + 1e-12
  damped = square + weight * jnp.eye(units)
  left = jnp.asarray(outputs_md, jnp.float32) - jnp.matmul(hidden, start, precision='highest')
  moved = jnp.einsum('mf,md->fd', hidden, left, precision='highest')
  return start + jax.scipy.linalg.solve(damped, moved, assume_a='pos')


def zip_units(
    members: Experts, coefficients: Sequence[float], correlation_uu: np.ndarray | None = None
) -> dict[str, np.ndarray]:
  """One expert of f units from several of f each, as MC-SMoE's variant of ZipIt does it.

  The two most alike units of all become their weighted mean, until f are left. (ZipIt itself sums
  rows of wo; here they are averaged like the rest.)

  Args:
    members: the group's experts, [e, ...]. coefficients: a weight an expert.
    correlation_uu: of all e * f hidden units over the group's tokens; None goes by inner products
      of weights, exact for merged units.
  """
  inputs = [name for name in ('wi', 'gate') if name in members]
  count, units = members['wo'].shape[:2]
  parts = {name: np.asarray(members[name], np.float32).swapaxes(1, 2) for name in inputs}
  parts['wo'] = np.asarray(members['wo'], np.float32)
  parts |= {name: np.asarray(members[name], np.float32)[..., None]
            for name in ('wi_bias', 'gate_bias') if name in members}
  widths = np.cumsum([0, *(p.shape[2] for p in parts.values())])
  rows = np.concatenate([p.reshape(count * units, -1) for p in parts.values()], 1)
  measured = widths[len(inputs) + 1]  # biases are no part of a unit's likeness
  weight = np.repeat(np.asarray(coefficients, np.float32), units)
  lowest = np.finfo(np.float32).min
  by_weights = correlation_uu is None
  if by_weights:
    alike = rows[:, :measured] @ rows[:, :measured].T
    np.fill_diagonal(alike, lowest)
  else:
    alike = np.array(correlation_uu, np.float32)
    np.fill_diagonal(alike, -1)
  while len(rows) > units:
    i, j = sorted(np.unravel_index(np.argmax(alike), alike.shape))
    both = weight[i] + weight[j]
    rows[i] = (weight[i] * rows[i] + weight[j] * rows[j]) / (both + np.float32(EPS))
    if by_weights:
      merged = rows[:, :measured] @ rows[i, :measured]
    else:
      merged = np.float32(_ZIP_SHARE) * np.minimum(alike[i], alike[j])
    alike[i] = alike[:, i] = merged
    alike[i, i] = lowest if by_weights else -1
    weight[i] = both
    alike = np.delete(np.delete(alike, j, 0), j, 1)
    rows, weight = np.delete(rows, j, 0), np.delete(weight, j)
  out = {name: rows[:, a:b] for name, a, b in zip(parts, widths, widths[1:])}
  for name in inputs:
    out[name] = out[name].T
  for name in ('wi_bias', 'gate_bias'):
    if name in out:
      out[name] = out[name][:, 0]
  return out


def stable_rank(w_edf: jax.typing.ArrayLike) -> jax.Array:
  """|W|_F^2 / (|W|_2^2 + 1e-7) of each matrix [..., d, f]: how well a low rank will do."""
  values = jnp.linalg.svd(jnp.asarray(w_edf, jnp.float32), compute_uv=False)
  return (values**2).sum(-1) / (values[..., 0] ** 2 + EPS)


def _labels(labels_e: np.ndarray) -> tuple[jax.Array, int]:
  labels = np.asarray(labels_e)
  count = int(labels.max()) + 1
  if set(labels.tolist()) != set(range(count)):
    raise UserError(f'labels {labels.tolist()}: every group from 0 to {count - 1} needs an expert')
  return jnp.asarray(labels, jnp.int32), count


def _like(a_g: jax.Array, w: Any) -> jax.Array:
  return a_g.reshape(-1, *(1,) * (w.ndim - 1))


def _sums(w: Any, weight_e: jax.Array, labels_e: jax.Array, count: int) -> jax.Array:
  own = jnp.asarray(w, jnp.float32) * _like(weight_e, w)
  return jax.ops.segment_sum(own, labels_e, count)
