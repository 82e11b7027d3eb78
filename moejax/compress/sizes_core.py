"""Quantiles of how large numbers are, from counts: any number of them, in one pass.

Counts are by the upper half of a float32's bits, which is a bfloat16: 256 to each power of two, so
that a quantile is known to 0.4 %. Memory is that of 32,768 counts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import UserError

_BINS = 1 << 15


def empty() -> np.ndarray:
  """Counts of nothing, int64."""
  return np.zeros(_BINS, np.int64)


def add(counts: np.ndarray, values: jax.typing.ArrayLike) -> np.ndarray:
  """Counts with the absolute values of an array of any shape added.

  Raises:
    UserError: values that are not finite.
  """
  flat = np.asarray(values, np.float32).reshape(-1)
  if not flat.size:
    return counts
  new = np.asarray(_counted(jnp.asarray(flat))).astype(np.int64)
  if new[0x7F80:].any():
    raise UserError(f'{int(new[0x7F80:].sum())} of {flat.size} activations are not finite')
  return counts + new


@functools.partial(jax.jit)
def _counted(flat: jax.Array) -> jax.Array:
  bits = jax.lax.bitcast_convert_type(jnp.abs(flat), jnp.uint32)
  return jnp.bincount((bits >> 16).astype(jnp.int32), length=_BINS)


def cut(counts: np.ndarray, share: float) -> float:
  """The least of the sizes known that at least `share` of the values do not exceed.

  0 where so many are 0, or too small to tell from it.

  Raises:
    UserError: no values, or a share that is not in [0, 1).
  """
  if not 0 <= share < 1:
    raise UserError(f'sparsity = {share}: a share of the activations, in [0, 1)')
  total = int(counts.sum())
  if not total:
    raise UserError('no activations were measured: give the calibration at least one token')
  place = int(np.searchsorted(np.cumsum(counts), share * total))
  if place == 0:
    return 0.0
  return float(np.uint32((place << 16) | 0xFFFF).view(np.float32))


def share(counts: np.ndarray, size: float) -> float:
  """The share of the values that are at most a size that `cut` gave."""
  bits = int(np.float32(size).view(np.uint32))
  return float(counts[: (bits >> 16) + 1].sum() / max(int(counts.sum()), 1))
