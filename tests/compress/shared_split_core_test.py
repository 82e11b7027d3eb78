"""CMoE's split: the recorded marks, costs and scores, exact assignment, ties and dead neurons."""

from pathlib import Path

import numpy as np
import pytest
from scipy import optimize

from moejax.compress import shared_split_core
from moejax.errors import UserError

FOLDER = Path(__file__).parents[1] / 'vectors' / 'moefication'


@pytest.fixture(scope='module')
def data():
  out = dict(np.load(FOLDER / 'cmoe_swiglu.npz'))
  out['x_md'] = out['x'].reshape(-1, 32)
  out['marks'] = out['markers'].astype(bool)
  return out


def columns(marks, a, b):
  """L1 distances of columns, the plain way."""
  return np.abs(marks[:, a, None].astype(float) - marks[:, None, b].astype(float)).sum(0)


def least(cost):
  """SciPy's optimum on repeated columns."""
  repeated = np.repeat(cost, cost.shape[0] // cost.shape[1], 1)
  return repeated[optimize.linear_sum_assignment(repeated)].sum()


def test_recorded_hidden_values_and_marks(data):
  hidden = shared_split_core.hidden(data['x_md'], data['Wg'].T, data['Wu'].T)
  np.testing.assert_allclose(hidden, data['h_normalised'].reshape(-1, 128), atol=1e-6)
  found = shared_split_core.markers(hidden)
  assert found.dtype == bool
  np.testing.assert_array_equal(found, data['marks'])
  np.testing.assert_allclose(shared_split_core.rates(found), data['rates'], rtol=1e-6)


def test_recorded_split(data):
  marks, seeds = data['marks'], data['seed_neurons']
  split = shared_split_core.split(marks, 6, 32, seeds=seeds)
  np.testing.assert_array_equal(split.shared, data['shared'])
  assert split.routed.shape == (6, 16)
  every = np.concatenate([split.shared, split.routed.reshape(-1)])
  np.testing.assert_array_equal(np.sort(every), range(128))
  cost = sum(columns(marks, row, [seed]).sum() for row, seed in zip(split.routed, seeds))
  assert cost == data['assignment_cost_L1'] == 2546
  np.testing.assert_array_equal(
      shared_split_core.representatives(marks, data['routed']), data['representatives']
  )
  assert all(r in row for r, row in zip(split.representatives, split.routed))


def test_own_seeds_are_the_next_by_rate(data):
  split = shared_split_core.split(data['marks'], 6, 32)
  np.testing.assert_array_equal(split.shared, data['shared'])
  order = np.argsort(-data['rates'], kind='stable')
  np.testing.assert_array_equal(np.sort(data['rates'][order[32:38]]),
                                np.sort(data['rates'][data['seed_neurons']]))
  given = shared_split_core.split(data['marks'], 6, 32, seeds=order[32:38])
  np.testing.assert_array_equal(split.routed, given.routed)


def test_recorded_router(data):
  found = shared_split_core.router_probs(
      data['x_md'], data['Wg'].T, data['Wu'].T, data['representatives']
  )
  np.testing.assert_allclose(found, data['router_probs'].reshape(-1, 6), atol=1e-5)


@pytest.mark.parametrize('metric', ['l1', 'l2'])
def test_distances_to_columns_and_to_means(data, metric):
  marks = data['marks'][:, :20]
  centres = np.random.default_rng(0).random((len(marks), 3)).astype(np.float32)
  plain = marks[:, :, None] - centres[:, None].astype(np.float64)
  expected = np.abs(plain).sum(0) if metric == 'l1' else np.sqrt((plain**2).sum(0))
  np.testing.assert_allclose(
      shared_split_core.distances(marks, centres, metric), expected, rtol=1e-5
  )


def test_more_rounds_bring_members_nearer_to_their_means(data):
  marks = data['marks']
  spread = {}
  for rounds in (1, 20):
    split = shared_split_core.split(marks, 6, 32, 'l2', rounds)
    assert len(np.unique(split.routed)) == 96
    spread[rounds] = sum(
        ((marks[:, row] - marks[:, row].mean(1, keepdims=True)) ** 2).sum() for row in split.routed
    )
  assert spread[20] < spread[1]


@pytest.mark.parametrize('seed', range(60))
def test_assignment_is_exact(seed):
  rng = np.random.default_rng(seed)
  experts, size = rng.integers(1, 7, 2)
  shape = (experts * size, experts)
  cost = rng.integers(0, 5, shape).astype(float) if seed % 2 else rng.normal(size=shape)
  labels = shared_split_core.assign(cost)
  assert labels.dtype == np.int32
  np.testing.assert_array_equal(np.bincount(labels, minlength=experts), [size] * experts)
  found = cost[np.arange(len(cost)), labels].sum()
  np.testing.assert_allclose(found, least(cost), rtol=1e-9, atol=1e-9)


def test_assignment_of_many_neurons_to_one_centre():
  """All want the same expert: most must go along paths."""
  rng = np.random.default_rng(0)
  cost = rng.random((512, 16)) + np.arange(16)[None] * 2
  labels = shared_split_core.assign(cost)
  np.testing.assert_allclose(cost[np.arange(512), labels].sum(), least(cost), rtol=1e-9)


def test_marks_take_the_lower_index_and_never_a_zero():
  hidden = np.array([[1, -3, 3, 3, 0], [0, 0, 0, 0, 0], [0, 2, 0, 0, 0]], np.float32)
  expected = np.array([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]], bool)
  np.testing.assert_array_equal(shared_split_core.markers(hidden, 2), expected)
  assert shared_split_core.markers(np.zeros((0, 5)), 2).shape == (0, 5)


def test_zero_tokens_and_dead_neurons():
  x, weights = np.zeros((2, 3), np.float32), np.eye(3, 6, dtype=np.float32)
  hidden = shared_split_core.hidden(x, weights, weights)
  assert hidden.shape == (2, 6) and not hidden.any()
  np.testing.assert_allclose(
      shared_split_core.router_probs(x, weights, weights, np.array([0, 4])), 0.5
  )
  for shared in (0, 2):
    split = shared_split_core.split(np.zeros((4, 8), bool), 2, shared)
    np.testing.assert_array_equal(split.shared, range(shared))
    np.testing.assert_array_equal(np.sort(split.routed.reshape(-1)), range(shared, 8))


def test_what_cannot_be_done():
  marks, hidden = np.ones((4, 8), bool), np.ones((4, 8), np.float32)
  split = shared_split_core.split
  cases = [
      ('0 marks a token', lambda: shared_split_core.markers(hidden, 0)),
      ('9 marks a token', lambda: shared_split_core.markers(hidden, 9)),
      ('NaN', lambda: shared_split_core.markers(hidden * np.nan, 2)),
      ('inputs hold NaN', lambda: shared_split_core.hidden(hidden * np.nan, hidden, hidden)),
      ('one token or more', lambda: split(marks[:0], 2, 2)),
      ('8 neurons less 3 shared', lambda: split(marks, 2, 3)),
      ('8 neurons less 8 shared', lambda: split(marks, 2, 8)),
      ('8 neurons less -1 shared', lambda: split(marks, 3, -1)),
      ('0 rounds', lambda: split(marks, 2, 2, rounds=0)),
      ("metric 'cosine'", lambda: split(marks, 2, 2, 'cosine')),
      ('2 different neurons', lambda: split(marks, 2, 2, seeds=np.array([3, 3]))),
      ('2 different neurons', lambda: split(marks, 2, 2, seeds=np.array([0, 3]))),
      ('5 items do not make 2 parts', lambda: shared_split_core.assign(np.ones((5, 2)))),
      ('costs hold NaN', lambda: shared_split_core.assign(np.full((4, 2), np.nan))),
  ]
  for message, call in cases:
    with pytest.raises(UserError, match=message) as error:
      call()
    assert '\n' not in str(error.value)
