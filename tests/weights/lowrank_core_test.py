"""Low rank plus rest, against MC-SMoE's arrays."""

from pathlib import Path

import numpy as np
import pytest

from moejax.errors import UserError
from moejax.weights import lowrank_core

DATA = dict(np.load(Path(__file__).parents[1] / 'vectors' / 'mcsmoe' / 'losparse.npz'))


@pytest.mark.parametrize('shape', ['tall', 'wide'])
@pytest.mark.parametrize('rank', [2, 4, 8])
def test_split(shape, rank):
  w = DATA[f'svd/{shape}/W'].T
  want = lambda name: DATA[f'svd/{shape}/r{rank}/{name}']
  left, right, rest = lowrank_core.split(w, rank)
  np.testing.assert_allclose((left @ right).T, want('LR'), atol=1e-5)
  np.testing.assert_allclose(rest.T, want('S'), atol=1e-5)
  np.testing.assert_allclose(left @ right + rest, w, atol=1e-6)
  # Published L is the output side: our right factor.
  np.testing.assert_allclose(np.linalg.norm(right, axis=1), want('L_colnorm'), atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(left, axis=0), want('R_rownorm'), atol=1e-5)


def test_largest_leaves_the_least_rest():
  w = DATA['svd/tall/W']
  rest = lambda keep: np.linalg.norm(lowrank_core.split(w, 4, keep=keep)[2])
  norm = {keep: rest(keep) for keep in lowrank_core.KEEP}
  assert norm['largest'] < norm['random'] < norm['smallest']
  tail = DATA['svd/tall/singular_values'][4:]
  np.testing.assert_allclose(norm['largest'] ** 2, (tail**2).sum(), rtol=1e-5)


def test_a_stack_is_split_matrix_by_matrix():
  w = np.stack([DATA['svd/tall/W'], DATA['svd/tall/W'][::-1]])
  stacked = lowrank_core.split(w, 3)
  for i in range(2):
    left, right, rest = lowrank_core.split(w[i], 3)
    np.testing.assert_allclose(stacked[0][i] @ stacked[1][i], left @ right, atol=1e-5)
    np.testing.assert_allclose(stacked[2][i], rest, atol=1e-5)


def test_ranks():
  assert lowrank_core.rank_of_ratio((768, 3072), 32 * (768 + 3072) / (768 * 3072)) == 32
  assert lowrank_core.rank_of_ratio((4, 4), 9.0) == 4
  w = np.diag([3.0, 2.0, 1.0])
  shares = {1: 9 / 14, 2: 13 / 14, 3: 1.0}
  assert {lowrank_core.rank_of_energy(w, share): share for share in shares.values()} == shares


def test_bad_values():
  with pytest.raises(UserError, match=r'rank = 5: a matrix \(3, 4\) has ranks from 0 to 3'):
    lowrank_core.split(np.ones((3, 4)), 5)
  with pytest.raises(UserError, match="did you mean 'largest'"):
    lowrank_core.split(np.ones((3, 4)), 2, keep='large')
