"""Experts of equal size around their means: as good as the recorded ones, and never made worse."""

import itertools
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from moejax.compress import cluster_core
from moejax.errors import UserError

pytestmark = pytest.mark.once

VECTORS = pathlib.Path(__file__).parent.parent / 'vectors' / 'moefication'
CASES = [('planted', 4), ('planted', 8), ('planted', 32), ('plain', 4), ('plain', 8),
         ('plain', 32), ('sparse', 4), ('sparse', 8), ('sparse', 16)]


def recorded(name):
  return np.load(VECTORS / f'param_cluster_{name}.npz')


def noisy_groups(f, d, experts, noise=1.5, seed=0):
  """Rows around unit directions, in a shuffled order, and whose group each is."""
  rng = np.random.default_rng(seed)
  groups = rng.permutation(np.arange(f) % experts)
  directions = cluster_core.normalised(rng.normal(size=(experts, d)))
  noise = noise * rng.normal(size=(f, d)) / np.sqrt(d)
  return cluster_core.normalised(directions[groups] + noise), groups


def gains(rows, labels):
  """What every exchange of two rows would lower the objective by, float64 [f, f], the long way."""
  now = cluster_core.objective(rows, labels)
  out = np.zeros((len(rows), len(rows)))
  for i, j in itertools.combinations(range(len(rows)), 2):
    other = labels.copy()
    other[[i, j]] = labels[[j, i]]
    out[i, j] = now - cluster_core.objective(rows, other)
  return out


def assert_balanced(labels, experts):
  assert labels.dtype == np.int32
  counts = np.bincount(labels, minlength=experts)
  np.testing.assert_array_equal(counts, [len(labels) // experts] * experts)


@pytest.mark.parametrize('name', ['planted', 'plain', 'sparse'])
def test_rows_of_unit_length_are_the_recorded_ones(name):
  weights = np.load(VECTORS / f'fixture_{name}.npz')['W1']
  rows = cluster_core.normalised(jnp.asarray(weights))
  assert rows.dtype == np.float32
  np.testing.assert_allclose(rows, recorded(name)['W1_normalised'], atol=1e-6)


def test_rows_of_zeros_stay():
  rows = cluster_core.normalised([[0, 0], [3e30, 4e30], [3e-30, 4e-30]])
  np.testing.assert_allclose(rows, [[0, 0], [0.6, 0.8], [0.6, 0.8]], rtol=1e-6)


@pytest.mark.parametrize('name, experts', CASES)
def test_objective_of_recorded_labels(name, experts):
  arrays = recorded(name)
  for kind in ('', 'best_known_'):
    np.testing.assert_allclose(
        cluster_core.objective(arrays['W1_normalised'], arrays[f'E{experts}_{kind}labels']),
        arrays[f'E{experts}_{kind}objective'], rtol=1e-6,
    )


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('name, experts', CASES)
def test_no_worse_than_the_recorded(name, experts, seed):
  arrays = recorded(name)
  labels = cluster_core.balanced_kmeans(arrays['W1_normalised'], experts, seed=seed)
  assert_balanced(labels, experts)
  found = cluster_core.objective(arrays['W1_normalised'], labels)
  best = arrays[f'E{experts}_best_known_objective']
  assert found <= arrays[f'E{experts}_objective'] * (1 + 1e-6)
  assert found <= best * (1 + (1e-4 if experts == 8 and name != 'plain' else 0.01))


@pytest.mark.parametrize('held', [True, False])
def test_planted_groups_are_found_with_one_start(held, monkeypatch):
  if not held:
    monkeypatch.setattr(cluster_core, 'HELD_ROWS', 0)
  rows, groups = noisy_groups(320, 64, 20)
  labels = cluster_core.balanced_kmeans(rows, 20, starts=1)
  assert len(np.unique(np.stack([groups, labels]), axis=1).T) == 20


@pytest.mark.parametrize('most', [256, 3])
@pytest.mark.parametrize('held', [True, False])
def test_swaps_end_where_none_gains(most, held, monkeypatch):
  monkeypatch.setattr(cluster_core, 'VISIT_ROWS', most)
  monkeypatch.setattr(cluster_core, 'BLOCK_ROWS', 16)
  if not held:
    monkeypatch.setattr(cluster_core, 'HELD_ROWS', 0)
  rows = np.random.default_rng(0).normal(size=(36, 5)).astype(np.float32)
  # A programme is compiled per number of rows visited.
  cluster_core._visit.clear_cache()
  start = np.arange(36, dtype=np.int32) % 4
  assert gains(rows, start).max() > 1
  labels = cluster_core.swap_refine(rows, start, 4)
  assert_balanced(labels, 4)
  assert gains(rows, labels).max() < 1e-4


def test_each_round_of_swaps_lowers_the_objective():
  rows = np.random.default_rng(1).normal(size=(128, 12)).astype(np.float32)
  start = np.arange(128, dtype=np.int32) % 16
  rounds = [cluster_core.swap_refine(rows, start, 16, max_rounds=n) for n in range(4)]
  found = [cluster_core.objective(rows, labels) for labels in rounds]
  np.testing.assert_array_equal(rounds[0], start)
  assert found[1] < 0.9 * found[0]
  assert found[0] > found[1] >= found[2] >= found[3]
  again = cluster_core.swap_refine(rows, rounds[3], 16)
  np.testing.assert_array_equal(again, cluster_core.swap_refine(rows, again, 16))


@pytest.mark.parametrize('spread', [1.0, 1e-3])
def test_assignment_is_nearly_the_best(spread):
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(96, 1)) + spread * rng.normal(size=(96, 8))
  labels = cluster_core.balanced_assignment(scores, 12)
  assert_balanced(labels, 8)
  copies = np.repeat(scores, 12, 1)
  best = copies[optimize.linear_sum_assignment(copies, maximize=True)].sum()
  assert scores[np.arange(96), labels].sum() >= best - 96 * 1e-4 * np.ptp(scores)


@pytest.mark.parametrize('rows', [
    np.zeros((12, 3)), np.ones((12, 3)), np.repeat(np.eye(3), 4, 0),
    np.concatenate([np.zeros((6, 3)), 1e30 * np.ones((6, 3))]),
])
@pytest.mark.parametrize('experts', [1, 2, 3, 12])
def test_equal_rows_and_rows_of_zeros(rows, experts):
  for refine in (True, False):
    labels = cluster_core.balanced_kmeans(rows, experts, starts=2, refine=refine)
    assert_balanced(labels, experts)
  if experts == min(3, len(np.unique(rows, axis=0))):
    assert cluster_core.objective(rows, labels) <= 1e-12 * np.square(rows).sum()


def test_one_seed_gives_one_result_and_another_another():
  rows = np.random.default_rng(0).normal(size=(64, 8))
  one, again, other = (
      cluster_core.balanced_kmeans(rows, 8, starts=1, seed=seed) for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(one, again)
  assert (one != other).any()


@pytest.mark.parametrize('refine', [True, False])
def test_labels_to_start_from_are_never_made_worse(refine):
  arrays = recorded('plain')
  rows, best = arrays['W1_normalised'], arrays['E8_best_known_labels']
  labels = cluster_core.balanced_kmeans(rows, 8, init_labels=best, refine=refine)
  assert cluster_core.objective(rows, labels) <= cluster_core.objective(rows, best) * (1 + 1e-9)
  random = np.arange(128) % 8
  labels = cluster_core.balanced_kmeans(rows, 8, init_labels=random, refine=refine)
  assert cluster_core.objective(rows, labels) < 0.95 * cluster_core.objective(rows, random)


@pytest.mark.parametrize('run, message', [
    (lambda rows: cluster_core.expert_size(12, 5), 'experts=5 .* 1, 2, 3, 4, 6, 12$'),
    (lambda rows: cluster_core.balanced_kmeans(rows, 0), 'd_ff 12 .* experts=0 '),
    (lambda rows: cluster_core.balanced_kmeans(rows, 24), 'd_ff 12 .* experts=24 '),
    (lambda rows: cluster_core.balanced_kmeans(rows, 3, starts=0), 'starts=0'),
    (lambda rows: cluster_core.balanced_kmeans(rows * [1, np.nan], 3), '12 rows are not finite'),
    (lambda rows: cluster_core.normalised(rows * [1e99, 1]), 'not finite, the first is row 0'),
    (lambda rows: cluster_core.balanced_kmeans(rows[0], 1), r'shape \(2,\)'),
    (lambda rows: cluster_core.swap_refine(rows, np.zeros(12, int), 3), '3 experts 4 of 12'),
    (lambda rows: cluster_core.swap_refine(rows, np.zeros((3, 4), int), 3), r'shape \(3, 4\)'),
])
def test_what_cannot_be_clustered_is_named(run, message):
  with pytest.raises(UserError, match=message) as caught:
    run(np.ones((12, 2)))
  assert '\n' not in str(caught.value)


def test_experts_that_divide():
  assert [cluster_core.expert_size(12, n) for n in (1, 4, 12)] == [12, 3, 1]
