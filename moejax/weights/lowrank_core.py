"""A matrix as low rank plus a rest: W = left right + rest (LoSparse, arXiv 2306.11222, eq. 4)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import UserError, did_you_mean

KEEP = ('largest', 'smallest', 'random')


def split(
    w_df: jax.typing.ArrayLike, rank: int, *, keep: str = 'largest', seed: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """left [..., d, r], right [..., r, f] and rest [..., d, f], float32, that add up to w.

  Each singular value is shared evenly: left = U sqrt(s), right = sqrt(s) V^T.

  Args:
    w_df: [..., d, f]. rank: between 0 and min(d, f).
    keep: which singular directions; 'smallest' and 'random' are controls.

  Raises:
    UserError: an unknown `keep`, or a rank that the matrix does not have.
  """
  w = jnp.asarray(w_df, jnp.float32)
  most = min(w.shape[-2:])
  if not 0 <= rank <= most:
    raise UserError(f'rank = {rank}: a matrix {w.shape[-2:]} has ranks from 0 to {most}')
  if keep not in KEEP:
    raise UserError(f'keep = {keep!r}: one of {KEEP}{did_you_mean(keep, KEEP)}')
  u, s, vt = jnp.linalg.svd(w, full_matrices=False)
  order = np.arange(most)
  if keep == 'smallest':
    order = order[::-1]
  elif keep == 'random':
    order = np.random.default_rng(seed).permutation(most)
  chosen = np.sort(order[:rank])
  root = jnp.sqrt(s[..., chosen])
  left, right = u[..., :, chosen] * root[..., None, :], root[..., :, None] * vt[..., chosen, :]
  return left, right, w - jnp.matmul(left, right, precision='highest')


def rank_of_ratio(shape: tuple[int, int], ratio: float) -> int:
  """The rank whose factors have `ratio` times the weights of a matrix [d, f], rounded up."""
  d, f = shape
  return min(math.ceil(ratio * d * f / (d + f)), d, f)


def rank_of_energy(w_df: jax.typing.ArrayLike, share: float) -> int:
  """The least rank that holds a share of the squared singular values; of a stack, of all."""
  energy = np.asarray(jnp.linalg.svd(jnp.asarray(w_df, jnp.float32), compute_uv=False)) ** 2
  energy = energy.reshape(-1, energy.shape[-1]).sum(0)
  reached = np.cumsum(energy) >= share * energy.sum() * (1 - 1e-6)
  return int(np.argmax(reached)) + 1
