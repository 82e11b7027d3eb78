"""Co-activation: the recorded graphs, any cut of the tokens, balance, and what refinement gains."""

from pathlib import Path
import sys
import types

import numpy as np
import pytest

from moejax.compress import coactivation_core
from moejax.errors import UserError

FOLDER = Path(__file__).parents[1] / 'vectors' / 'moefication'
NAMES = ('sparse', 'planted', 'plain')


def load(name):
  data = dict(np.load(FOLDER / f'coactivation_{name}.npz'))
  return data, np.maximum(data['X'] @ data['W1'].T, 0)


def summed(hidden, weights, blocks=1):
  total = coactivation_core.add_hidden(None, hidden[:0], weights)
  for block in np.array_split(hidden, blocks):
    total = coactivation_core.add_hidden(total, block, weights)
  return coactivation_core.adjacency(total)


def inside(matrix, labels):
  """The plain sum over pairs of different neurons of one expert."""
  same = labels[:, None] == labels[None]
  np.fill_diagonal(same, False)
  return float(matrix[same].sum(dtype=np.float64))


def assert_balanced(labels, experts):
  assert labels.dtype == np.int32
  np.testing.assert_array_equal(
      np.bincount(labels, minlength=experts), [len(labels) // experts] * experts
  )


@pytest.mark.parametrize('name', NAMES)
def test_the_recorded_matrices_and_graph_come_out(name):
  data, hidden = load(name)
  np.testing.assert_allclose(summed(hidden, 'product'), data['coact_paper'], rtol=1e-4, atol=1e-5)
  matrix = summed(hidden, 'reference')
  np.testing.assert_allclose(matrix, data['adj'], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
      coactivation_core.threshold(matrix), data['threshold'], rtol=1e-5
  )
  rows, columns, weights = coactivation_core.reference_edges(matrix)
  np.testing.assert_array_equal(rows, data['edge_row'])
  np.testing.assert_array_equal(columns, data['edge_col'])
  off = np.abs(weights - data['edge_weight'])
  assert off.max() <= 1 and off.mean() <= 1e-3
  assert len(rows) // 2 == data['num_edges_header']


def test_counts_are_tokens_for_which_both_are_active():
  hidden = load('sparse')[1][:100]
  active = hidden > 0
  np.testing.assert_array_equal(summed(hidden, 'count'), active.T.astype(int) @ active.astype(int))


@pytest.mark.parametrize('weights', coactivation_core.WEIGHTS)
def test_blocks_of_tokens_change_nothing(weights):
  hidden = load('sparse')[1]
  np.testing.assert_array_equal(summed(hidden, weights, blocks=37), summed(hidden, weights))


@pytest.mark.parametrize('neurons', [5, 64, 100])
def test_reference_is_the_sum_of_cut_groups_of_eight(neurons):
  hidden = np.random.default_rng(neurons).normal(size=(1037, neurons)).astype(np.float32)
  positive = np.maximum(hidden, 0)
  groups = positive[:1032].reshape(-1, 8, neurons)
  expected = np.minimum(np.einsum('gtn,gtm->gnm', groups, groups), 1).sum(0)
  np.testing.assert_allclose(summed(hidden, 'reference', 3), expected, rtol=1e-5)


def test_tokens_wait_for_their_group_and_the_total_stays_as_it_was():
  one = coactivation_core.add_hidden(None, np.ones((7, 2)), 'reference')
  assert not coactivation_core.adjacency(one).any()
  two = coactivation_core.add_hidden(one, np.ones((1, 2)), 'reference')
  np.testing.assert_array_equal(coactivation_core.adjacency(two), np.ones((2, 2)))
  assert not coactivation_core.adjacency(one).any()
  empty = coactivation_core.add_hidden(None, np.zeros((0, 3)))
  np.testing.assert_array_equal(coactivation_core.adjacency(empty), np.zeros((3, 3)))


def test_the_threshold_steps_over_percentiles_that_are_zero():
  matrix = np.zeros((10, 10), np.float32)
  matrix[0, 1] = matrix[1, 0] = 5
  matrix[2, 3] = matrix[3, 2] = 11
  assert coactivation_core.threshold(matrix) == 11  # The 100th: four entries of a hundred.
  edges = np.stack(coactivation_core.reference_edges(matrix), 1)
  np.testing.assert_array_equal(edges, [[2, 3, 1], [3, 2, 1]])


@pytest.mark.parametrize('name', NAMES)
def test_intra_fraction_is_as_recorded(name):
  data, _ = load(name)
  for key in ('E4_metis_labels', 'E8_metis_labels'):
    found = coactivation_core.intra_fraction(data['adj'], data[key])
    np.testing.assert_allclose(found, data[f'{key[:2]}_intra_fraction_metis'], rtol=1e-5)
  assert coactivation_core.intra_fraction(np.eye(4), np.zeros(4, int)) == 0


def check_against_metis(name, experts, method):
  data, _ = load(name)
  for seed in range(3):
    labels = coactivation_core.partition(data['adj'], experts, seed, method)
    assert_balanced(labels, experts)
    found = coactivation_core.intra_fraction(data['adj'], labels)
    assert found > data[f'E{experts}_intra_fraction_random'] * 1.02
    assert found >= data[f'E{experts}_intra_fraction_metis'] * 0.9999
    again = coactivation_core.partition(data['adj'], experts, seed, method)
    np.testing.assert_array_equal(labels, again)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('experts', [4, 8])
def test_the_own_partition_keeps_what_metis_keeps(name, experts):
  check_against_metis(name, experts, 'own')


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('experts', [4, 8])
def test_the_partition_through_metis_is_no_worse_than_the_recorded_one(name, experts):
  pytest.importorskip('pymetis')
  check_against_metis(name, experts, 'metis')


def test_metis_that_is_not_installed(monkeypatch):
  monkeypatch.setitem(sys.modules, 'pymetis', None)
  matrix = load('planted')[0]['adj']
  with pytest.raises(UserError, match='pip install pymetis'):
    coactivation_core.partition(matrix, 4, method='metis')
  found = coactivation_core.partition(matrix, 4, method='auto')
  np.testing.assert_array_equal(found, coactivation_core.partition(matrix, 4, method='own'))


def test_parts_of_metis_are_repaired_and_refined(monkeypatch):
  """A stand-in for pymetis that checks the graph and leaves an expert out."""
  data, _ = load('sparse')
  seen: dict[str, np.ndarray] = {}

  def part_graph(parts, graph, eweights, options):
    seen.update(starts=graph[0], columns=graph[1], weights=eweights, seed=options)
    labels = data['E4_metis_labels'].copy()
    labels[labels == 3] = 0
    return 0, labels.tolist()

  fake = types.SimpleNamespace(
      part_graph=part_graph, Options=lambda seed: seed, zero_copy_dtype=lambda: np.int32,
      CSRAdjacency=lambda starts, columns: (starts, columns),
  )
  monkeypatch.setitem(sys.modules, 'pymetis', fake)
  labels = coactivation_core.partition(data['adj'], 4, 5, 'metis')
  assert seen['seed'] == 5
  np.testing.assert_array_equal(seen['columns'], data['edge_col'])
  rows = np.repeat(np.arange(128), np.diff(seen['starts']))
  np.testing.assert_array_equal(rows, data['edge_row'])
  assert np.mean(seen['weights'] != data['edge_weight']) <= 1e-3
  assert_balanced(labels, 4)
  assert coactivation_core.intra_fraction(data['adj'], labels) > 0.55


def test_repair_moves_as_few_as_it_must_and_those_that_lose_least():
  matrix = np.zeros((6, 6), np.float32)
  matrix[:3, :3] = matrix[3:, 3:] = 1
  np.fill_diagonal(matrix, 7)  # The diagonal must not count.
  labels = coactivation_core.repair(matrix, np.array([0, 0, 0, 0, 1, 1]), 2)
  np.testing.assert_array_equal(labels, [0, 0, 0, 1, 1, 1])


def test_refinement_never_loses_and_ends_where_no_trade_helps():
  rng = np.random.default_rng(0)
  for _ in range(10):
    matrix = rng.gamma(0.3, size=(24, 24))
    matrix += matrix.T
    start = rng.permutation(np.repeat(range(4), 6))
    labels = coactivation_core.refine(matrix, start)
    assert_balanced(labels, 4)
    best = inside(matrix, labels)
    assert best > inside(matrix, start)
    for i in range(24):
      for j in range(i):
        traded = labels.copy()
        traded[[i, j]] = labels[[j, i]]
        assert inside(matrix, traded) <= best * (1 + 1e-9)


@pytest.mark.parametrize('method', ['own', 'metis'])
def test_neurons_that_are_never_active(method):
  if method == 'metis':
    pytest.importorskip('pymetis')
  matrix = np.zeros((24, 24), np.float32)
  for first in (0, 8):
    matrix[first : first + 6, first : first + 6] = 1
  labels = coactivation_core.partition(matrix, 4, method=method)
  assert_balanced(labels, 4)
  assert len(set(labels[:6].tolist())) == 1 and len(set(labels[8:14].tolist())) == 1
  assert_balanced(coactivation_core.partition(np.eye(24), 4, method=method), 4)
  for experts in (1, 24):
    assert_balanced(coactivation_core.partition(matrix, experts, method=method), experts)
  one_pair = np.eye(24)
  one_pair[3, 20] = one_pair[20, 3] = 0.1  # Far below the diagonal: a graph without edges.
  labels = coactivation_core.partition(one_pair, 4, method=method)
  assert_balanced(labels, 4)
  assert labels[3] == labels[20]


def test_what_cannot_be_done():
  add, cut = coactivation_core.add_hidden, coactivation_core.partition
  total = add(None, np.ones((3, 4)))
  cases = [
      ("weights 'sum'", lambda: add(None, np.ones((3, 4)), 'sum')),
      ("weights 'count': 'product'", lambda: add(total, np.ones((3, 4)), 'count')),
      (r'shape \(3, 5\)', lambda: add(total, np.ones((3, 5)))),
      (r'shape \(3,\)', lambda: add(None, np.ones(3))),
      ('NaN', lambda: add(None, np.full((3, 4), np.nan))),
      ('NaN', lambda: cut(np.full((4, 4), np.nan), 2)),
      ('below 0', lambda: cut(-np.ones((4, 4)), 2)),
      (r'shape \(4, 3\)', lambda: cut(np.ones((4, 3)), 2)),
      ('4 neurons do not make 3 experts', lambda: cut(np.ones((4, 4)), 3)),
      ('4 neurons do not make 0 experts', lambda: cut(np.ones((4, 4)), 0)),
      ("method 'kway'", lambda: cut(np.ones((4, 4)), 2, method='kway')),
      ('no neuron is active', lambda: coactivation_core.reference_edges(np.zeros((4, 4)))),
  ]
  for message, call in cases:
    with pytest.raises(UserError, match=message) as error:
      call()
    assert '\n' not in str(error.value)
