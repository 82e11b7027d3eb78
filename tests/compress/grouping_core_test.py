"""Grouping: every method's contract, budgets and their bounds, planted groups found again."""

import numpy as np
import pytest

from moejax.compress import grouping_core
from moejax.errors import UserError

USAGE = np.array([0.1, 0.3, 0.05, 0.25, 0.2, 0.1])


@pytest.fixture
def planted():
  """Vectors of six experts in three clusters: {0, 3}, {1, 4, 5}, {2}."""
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(3, 12)) * 3
  return centres[[0, 1, 2, 0, 1, 1]] + rng.normal(size=(6, 12)) * 0.1


def alike(vectors):
  norm = np.linalg.norm(vectors, axis=1)
  return (vectors @ vectors.T / norm[:, None] / norm[None] + 1) / 2


METHODS = {
    'assign': lambda v, n: grouping_core.assign(alike(v), USAGE, n),
    'spectral': lambda v, n: grouping_core.spectral(alike(v), USAGE, n),
    'agglomerative': lambda v, n: grouping_core.agglomerative(v, USAGE, n),
    'anchored': lambda v, n: grouping_core.anchored(alike(v), USAGE, n),
    'random': lambda v, n: grouping_core.random(USAGE, n, seed=1),
}


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('count', range(1, 7))
def test_no_group_is_empty_and_dominants_are_in_their_own(method, count, planted):
  groups = METHODS[method](planted, count)
  assert groups.count == count and groups.labels.dtype == np.int32
  assert sorted(set(groups.labels.tolist())) == list(range(count))
  np.testing.assert_array_equal(groups.labels[groups.dominant], np.arange(count))
  again = METHODS[method](planted, count)
  np.testing.assert_array_equal(again.labels, groups.labels)


@pytest.mark.parametrize('method', ['spectral', 'agglomerative'])
def test_planted_groups_are_found(method, planted):
  groups = METHODS[method](planted, 3)
  found = {frozenset(np.flatnonzero(groups.labels == g).tolist()) for g in range(3)}
  assert found == {frozenset({0, 3}), frozenset({1, 4, 5}), frozenset({2})}
  assert groups.dominant.tolist() == [1, 3, 2]  # by usage of the most used member


def test_experts_that_are_all_alike_still_make_groups():
  same = np.ones((6, 6))
  for groups in (grouping_core.spectral(same, USAGE, 4),
                 grouping_core.agglomerative(np.ones((6, 3)), USAGE, 4)):
    assert groups.count == 4 and len(set(groups.labels.tolist())) == 4


def test_an_anchor_absorbs_so_many(planted):
  groups = grouping_core.anchored(alike(planted), USAGE, 2, absorb=2)
  assert np.bincount(groups.labels).tolist() == [3, 3]
  assert groups.dominant.tolist() == [1, 3]
  assert groups.labels[4] == groups.labels[5] == 0 and groups.labels[0] == 1


def test_a_full_group_takes_no_more(planted):
  groups = grouping_core.assign(alike(planted), USAGE, 2, capacity=3)
  assert np.bincount(groups.labels).tolist() == [3, 3]
  with pytest.raises(UserError, match='2 groups of at most 2 experts do not hold 6 experts'):
    grouping_core.assign(alike(planted), USAGE, 2, capacity=2)


def test_a_global_budget_and_its_bounds():
  usage = {'a': np.array([0.7, 0.1, 0.1, 0.1]), 'b': np.array([0.3, 0.29, 0.21, 0.2])}
  assert grouping_core.global_counts(usage, 2) == {'a': 1, 'b': 3}
  assert grouping_core.global_counts(usage, 2, at_least=2, at_most=2) == {'a': 2, 'b': 2}
  assert grouping_core.global_counts(usage, 2, {'b'}) == {'a': 4, 'b': 2}
  assert grouping_core.global_counts(usage, 4) == {'a': 4, 'b': 4}
  flat = {'a': np.full(4, 0.25), 'b': np.array([0.7, 0.1, 0.1, 0.1])}
  assert grouping_core.global_counts(flat, 2) == {'a': 1, 'b': 1}  # tied with the threshold
  for average in (5, 0.5):
    with pytest.raises(UserError, match=f'{average} groups a layer cannot be made'):
      grouping_core.global_counts(usage, average)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('count', [0, 7])
def test_impossible_counts_are_said(method, count, planted):
  with pytest.raises(UserError, match=f'{count} groups of 6 experts: between 1 and 6'):
    METHODS[method](planted, count)


def test_dominants_alone_beside_what_is_left():
  groups = grouping_core.Groups(np.array([1, 3]), np.array([1, 0, 0, 1, 0, 1]))
  apart = grouping_core.beside_dominant(groups, together=False)
  assert apart.tolist() == [3, 0, 2, 1, 2, 3]
  assert grouping_core.beside_dominant(groups, together=True).tolist() == [2, 0, 2, 1, 2, 2]
