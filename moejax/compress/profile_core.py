"""How sparsely one layer's neurons fire, in sums over pieces of the tokens.

MoEfication (arXiv 2110.01786) rests on layers where a token activates few neurons; D2DMoE
(2310.04361) measures that by the square-Hoyer index, the number of neurons that are active in
effect. Memory is that of the sums, of the order of f, whatever the number of tokens; totals are
float64 on the host, and depend on how the tokens are cut by rounding alone.
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moejax.compress import chooser_core
from moejax.errors import UserError

PERCENTILES = (1, 10, 25, 50, 75, 90, 99)


@dataclasses.dataclass(frozen=True)
class Profile:
  """Sums over tokens; f neurons, e experts.

  count_c: tokens by their number of active neurons, int64 [f + 1]. active_f: tokens in which a
  neuron is active, int64 [f]. hidden_f: activations, float64 [f]. hoyer: the tokens' indices,
  float64. share_e: part of a token's mass in its best expert, its second best, ..., float64 [e];
  labels_f: the expert of each neuron, or None. threshold: a neuron is active if |h| is above.
  """

  count_c: np.ndarray
  active_f: np.ndarray
  hidden_f: np.ndarray
  hoyer: float
  share_e: np.ndarray
  labels_f: np.ndarray | None
  threshold: float

  @property
  def tokens(self) -> int:
    return int(self.count_c.sum())


@dataclasses.dataclass(frozen=True)
class Activity:
  """What a layer did; fractions are of its f neurons.

  active: the mean over tokens of the fraction that is active. percentiles: of that fraction, by
  percentage of the tokens. rate_f: fraction of the tokens in which a neuron is active. mean_f: its
  mean activation. zero_tokens: those in which nothing is active. hoyer: mean square-Hoyer index,
  (sum |h|)^2 / sum h^2, a token without activations counting 0. best_e: the mass that the best
  1, 2, ... experts of a token hold, a mean over tokens that have any, float64 [e]; None without
  labels.
  """

  tokens: int
  active: float
  percentiles: dict[int, float]
  rate_f: np.ndarray
  mean_f: np.ndarray
  zero_tokens: int
  hoyer: float
  best_e: np.ndarray | None


def empty(neurons: int, threshold: float = 0.0, labels_f: np.ndarray | None = None) -> Profile:
  """A profile of no tokens.

  Args:
    threshold: 0 for ReLU; for smooth activations what |h| must be above to count as active.
    labels_f: experts whose share of the mass is to be measured.

  Raises:
    UserError: labels of another number of neurons, or a threshold below 0.
  """
  if labels_f is not None and len(labels_f) != neurons:
    raise UserError(f'labels of {len(labels_f)} neurons for a layer of {neurons}')
  if not threshold >= 0:
    raise UserError(f'threshold = {threshold}: at least 0')
  labels = None if labels_f is None else np.asarray(labels_f, np.int32)
  return Profile(
      np.zeros(neurons + 1, np.int64), np.zeros(neurons, np.int64), np.zeros(neurons), 0.0,
      np.zeros(0 if labels is None else int(labels.max()) + 1), labels, threshold,
  )


def add(profile: Profile, hidden_mf: np.ndarray | jax.Array) -> Profile:
  """The profile with more tokens.

  Args:
    hidden_mf: what wo multiplies, of any float dtype.

  Raises:
    UserError: activations of another width, or that are not finite.
  """
  tokens, width = hidden_mf.shape
  if width != len(profile.active_f):
    raise UserError(f'activations of {width} neurons for a profile of {len(profile.active_f)}')
  if not tokens:
    return profile
  # Few shapes compile; rows of zeros add to the count of zeros alone.
  rows = 1 << (tokens - 1).bit_length() if tokens < 1024 else -(-tokens // 1024) * 1024
  padded = jnp.pad(jnp.asarray(hidden_mf), ((0, rows - tokens), (0, 0)))
  sums = jax.device_get(
      _sums(padded, profile.labels_f, profile.threshold, len(profile.share_e))
  )
  if not np.isfinite(sums['hidden']).all():
    places = np.flatnonzero(~np.isfinite(sums['hidden']))
    raise UserError(f'activations of {len(places)} neurons are not finite: {places[:5].tolist()}')
  count_c = profile.count_c + sums['count']
  count_c[0] -= rows - tokens
  return dataclasses.replace(
      profile, count_c=count_c, active_f=profile.active_f + sums['active'],
      hidden_f=profile.hidden_f + sums['hidden'],
      hoyer=profile.hoyer + float(sums['hoyer'].sum(dtype=np.float64)),
      share_e=profile.share_e + sums['share'],
  )


@functools.partial(jax.jit, static_argnames=('experts',))
def _sums(hidden_mf, labels_f, threshold, experts):
  h = hidden_mf.astype(jnp.float32)
  size = jnp.abs(h)
  active = size > threshold
  largest_m = size.max(-1)
  # Over the largest, so that squares neither overflow nor vanish.
  part = size / jnp.where(largest_m > 0, largest_m, 1.0)[:, None]
  square_m = jnp.square(part).sum(-1)
  out = {
      'count': jnp.bincount(active.sum(-1), length=h.shape[1] + 1),
      'active': active.sum(0), 'hidden': h.sum(0),
      'hoyer': jnp.square(part.sum(-1)) / jnp.where(square_m > 0, square_m, 1.0),
      'share': jnp.zeros(0),
  }
  if labels_f is not None:
    mass_me = chooser_core.activation_mass(part, labels_f, experts)
    total_m1 = mass_me.sum(-1, keepdims=True)
    share_me = mass_me / jnp.where(total_m1 > 0, total_m1, 1.0)
    out['share'] = jnp.sort(share_me, axis=-1, descending=True).sum(0)
  return out


def finish(profile: Profile, percentiles: Sequence[int] = PERCENTILES) -> Activity:
  """Means over the tokens of a profile.

  A percentile is the least fraction that so many of the tokens do not exceed.

  Raises:
    UserError: no tokens were added.
  """
  tokens, neurons = profile.tokens, len(profile.active_f)
  if not tokens:
    raise UserError('no tokens were profiled: give the calibration at least one')
  reached = np.cumsum(profile.count_c)
  fraction = lambda p: float(np.searchsorted(reached, max(p * tokens / 100, 1)) / neurons)
  best_e = None
  if profile.labels_f is not None:
    # Without activations a token has no share in any expert.
    some = profile.share_e.sum()
    best_e = np.cumsum(profile.share_e) / (some if some > 0 else 1.0)
  return Activity(
      tokens, float(profile.active_f.sum() / tokens / neurons),
      {p: fraction(p) for p in percentiles}, profile.active_f / tokens,
      profile.hidden_f / tokens, int(profile.count_c[0]), profile.hoyer / tokens, best_e,
  )
