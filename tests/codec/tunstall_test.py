"""Tables are complete prefix codes, the same on every machine, and near the entropy."""

import hashlib

import numpy as np
import pytest

from moejax.codec import tunstall

DESIGNS = range(len(tunstall.DESIGNS))

# Tables are part of the format: a changed digest is a changed format.
DIGESTS = {
    0: '9db9c3821a743894',
    7: '3f9cd291ac202bbc',
    13: '1e40a10088768c80',
}


def digest(table):
  data = table.length_u.astype('<i4').tobytes() + table.nonzeros_uk.astype('<u2').tobytes()
  return hashlib.sha256(data).hexdigest()[:16]


@pytest.mark.parametrize('design', sorted(DIGESTS))
def test_tables_never_change(design):
  assert digest(tunstall.table(design)) == DIGESTS[design]


@pytest.mark.parametrize('design', DESIGNS)
def test_codewords_are_the_leaves_of_a_full_tree(design):
  table = tunstall.table(design)
  # Kraft's sum over a ternary tree is exactly one when every inner node has its three children.
  lengths = np.bincount(table.length_u)
  total = sum(int(n) * 3 ** (table.max_length - k) for k, n in enumerate(lengths))
  assert total == 3**table.max_length
  # All strings differ.
  rows = np.column_stack([table.length_u, table.nonzeros_uk])
  assert len(np.unique(rows, axis=0)) == tunstall.CODEWORDS == 65535


@pytest.mark.parametrize('design', DESIGNS)
def test_nonzeros_lie_inside_the_codeword_in_order(design):
  table = tunstall.table(design)
  used = table.nonzeros_uk != tunstall.DROPPED
  position = np.where(used, table.nonzeros_uk.astype(int) >> 1, -1)
  assert (position < table.length_u[:, None]).all()
  later = used[:, 1:]
  assert (used[:, :-1] >= later).all()
  assert (position[:, 1:] > position[:, :-1])[later].all()


@pytest.mark.parametrize('design', DESIGNS)
def test_expected_rate_is_near_the_entropy_of_the_design(design):
  zero_cost, nonzero_cost = tunstall.DESIGNS[design]
  zero = 2 ** (-zero_cost / 4096)
  one = (1 - zero) / 2
  table = tunstall.table(design)
  count = (table.nonzeros_uk != tunstall.DROPPED).sum(1)
  probability = zero ** (table.length_u - count) * one**count
  assert probability.sum() == pytest.approx(1, abs=1e-9)
  entropy = -zero * np.log2(zero) - (1 - zero) * np.log2(one)
  rate = 16 / (probability @ table.length_u)
  limit = 1.10 if zero < 0.97 else 1.25 if zero < 0.997 else 1.4
  assert entropy < rate < limit * entropy
  assert abs(2 ** (-nonzero_cost / 4096) - one) < 2e-3 * one + 1e-4


def test_walking_the_tree_spells_each_codeword():
  table = tunstall.table(7)
  rng = np.random.default_rng(0)
  for code in rng.integers(0, tunstall.CODEWORDS, 200):
    fields = table.nonzeros_uk[code]
    symbols = np.zeros(table.length_u[code], int)
    for field in fields[fields != tunstall.DROPPED]:
      symbols[field >> 1] = 1 + (field & 1)
    node, found = 0, None
    for i, symbol in enumerate(symbols):
      if symbol:
        child = table.child_ns[node, symbol - 1]
      elif table.chain_n[node] == 1:
        child = -1 - table.chain_code_n[node]
      else:
        child = node + 1
      if child < 0:
        assert i == len(symbols) - 1
        found = -1 - child
      node = child
    assert found == code


def test_designs_near_prefers_its_own_share():
  for design in DESIGNS:
    zero = 2 ** (-tunstall.DESIGNS[design][0] / 4096)
    assert tunstall.designs_near(zero)[0] == design
