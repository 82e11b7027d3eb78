"""Scores and choices of pruning: recorded rounds, hand-worked cases, and what defines a method."""

import itertools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.compress import prune_core
from moejax.errors import UserError

VECTORS = Path(__file__).parents[1] / 'vectors' / 'mcsmoe'
SUMS = {
    'tokens': np.array([4.0, 2.0, 0.0, 10.0]), 'gate': np.array([3.0, 1.5, 0.0, 2.0]),
    'norm': np.array([8.0, 6.0, 0.0, 10.0]), 'square_norm': np.array([20.0, 18.0, 0.0, 11.0]),
    'gate_norm': np.array([6.0, 4.0, 0.0, 2.0]),
}


@pytest.mark.parametrize('method, want', [
    ('frequency', [4, 2, 0, 10]), ('soft_frequency', [3, 1.5, 0, 2]), ('ean', [8, 6, 0, 10]),
    ('man', [2, 3, 0, 1]), ('msan', [5, 9, 0, 1.1]), ('reap', [1.5, 2, 0, 0.2]),
])
def test_scores(method, want):
  np.testing.assert_allclose(prune_core.score(method, SUMS), want)


def test_scores_that_cannot_be():
  with pytest.raises(UserError, match=r"method = 'reep'.*did you mean 'reap'"):
    prune_core.score('reep', SUMS)
  bad = {**SUMS, 'norm': np.array([1.0, np.nan, 0.0, np.inf])}
  with pytest.raises(UserError, match=r'ean: the statistics of experts \[1, 3\] are not finite'):
    prune_core.score('ean', bad)


def test_aimer_is_least_for_the_most_even_weights():
  rng = np.random.default_rng(0)
  normal, even = rng.normal(size=(6, 8)), rng.choice([-1.0, 1.0], (6, 8))
  peaked = np.where(rng.random((6, 8)) < 0.2, 5.0, 0.01)
  stack = np.stack([normal, even, peaked])
  got = prune_core.aimer({'wi': stack, 'wo': stack.swapaxes(1, 2)})
  want = [-np.abs(w).mean() / np.sqrt((w**2).mean()) for w in stack]
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert list(np.argsort(got)) == [1, 0, 2]


def test_the_kept_are_the_most_salient_in_the_models_order():
  assert prune_core.keep(np.array([1.0, 5.0, 0.0, 5.0, 2.0]), 3).tolist() == [1, 3, 4]
  assert prune_core.keep(np.zeros(4), 2).tolist() == [0, 1]
  with pytest.raises(UserError, match='0 of 4 experts to keep'):
    prune_core.keep(np.zeros(4), 0)


def test_a_global_budget():
  scores = {'a': np.array([9.0, 1.0, 0.0, 0.0]), 'b': np.array([100.0, 101.0, 99.0, 100.0])}
  kept = prune_core.keep_globally(scores, 2.5)
  assert kept['a'].tolist() == [0] and kept['b'].tolist() == [0, 1, 2, 3]
  kept = prune_core.keep_globally(scores, 2.5, at_least=2, at_most=3)
  assert kept['a'].tolist() == [0, 1] and kept['b'].tolist() == [0, 1, 3]
  assert [len(k) for k in prune_core.keep_globally(scores, 4).values()] == [4, 4]
  with pytest.raises(UserError, match=r'4\.5 experts a layer cannot be kept in 2 layers of 4'):
    prune_core.keep_globally(scores, 4.5)
  unused = prune_core.keep_globally({'a': np.zeros(3), 'b': np.ones(3)}, 2)
  assert unused['a'].tolist() == [0] and unused['b'].tolist() == [0, 1, 2]


@pytest.mark.parametrize('beta', [0.1, 0.5, 1.0])
def test_task_specific_rounds_are_those_recorded(beta):
  data = np.load(VECTORS / 'task_specific_prune.npz')
  for layer in ('enc1', 'enc3', 'dec1', 'dec3'):
    alive = np.ones(8, bool)
    for i in range(3):
      alive = prune_core.task_specific(data[f'usage/{layer}'], alive, beta, 3, last=i == 2)
      np.testing.assert_array_equal(alive, data[f'beta{beta}/round{i}/alive/{layer}'])


@pytest.fixture
def layer():
  rng = np.random.default_rng(3)
  outputs = rng.normal(size=(6, 40, 5)) * np.array([0.1, 1, 2, 0.5, 1, 3])[:, None, None]
  return outputs, rng.normal(size=(40, 6))


def difference(outputs, logits, kept, top_k):
  full = np.einsum('me,emd->md', prune_core.gates_of(logits, top_k), outputs)
  part = np.einsum('me,emd->md', prune_core.gates_of(logits[:, kept], top_k), outputs[kept])
  return np.linalg.norm(full - part)


@pytest.mark.parametrize('top_k, count', [(1, 3), (2, 4), (2, 6)])
def test_the_best_subset_is_the_best(top_k, count, layer):
  outputs, logits = layer
  kept, error = prune_core.best_subset(outputs, logits, count, top_k)
  every = {
      chosen: difference(outputs, logits, list(chosen), top_k)
      for chosen in itertools.combinations(range(6), count)
  }
  assert every[tuple(kept.tolist())] == pytest.approx(min(every.values()), abs=1e-9)
  assert error == pytest.approx(every[tuple(kept.tolist())], abs=1e-6)


def test_too_many_subsets_are_searched_one_expert_at_a_time(layer):
  outputs, logits = layer
  _, best = prune_core.best_subset(outputs, logits, 3, 2)
  kept, error = prune_core.best_subset(outputs, logits, 3, 2, most=5)
  assert len(kept) == 3 and error >= best
  assert error == pytest.approx(difference(outputs, logits, kept, 2), rel=1e-6)
  with pytest.raises(UserError, match='1 of 6 experts to keep: between top_k = 2 and 6'):
    prune_core.best_subset(outputs, logits, 1, 2)


def test_skipping_is_by_the_median_ratio_of_gates():
  assert prune_core.skip_threshold([[0.8, 0.2], [0.5, 0.5], [0.1, 0.9]]) == pytest.approx(0.25)
  with pytest.raises(UserError, match='top-3'):
    prune_core.skip_threshold(np.ones((4, 3)))


def test_a_hidden_unit_counts_by_what_it_adds():
  rng = np.random.default_rng(0)
  hidden, wo = rng.normal(size=(50, 4)), rng.normal(size=(4, 3))
  got = prune_core.unit_score(wo, (hidden**2).sum(0))
  want = [np.linalg.norm(hidden[:, [u]] @ wo[[u]]) for u in range(4)]
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_two_of_four():
  w = jnp.array([[1.0, -4.0], [2.0, 3.0], [-3.0, 2.0], [4.0, 1.0], [1.0, 1.0], [1.0, 1.0],
                 [1.0, 1.0], [1.0, 1.0]])
  inputs = np.array([100.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 4.0]) ** 2
  got = np.asarray(prune_core.n_of_m(w, inputs, 2, 4))
  want = np.zeros((8, 2))
  want[[0, 3], 0], want[[0, 1], 1] = [1, 4], [-4, 3]
  want[[4, 7]] = 1  # of equals the first
  np.testing.assert_array_equal(got, want)
  assert ((got.reshape(2, 4, 2) != 0).sum(1) == 2).all()
  with pytest.raises(UserError, match='2:3 does not fit 8 inputs'):
    prune_core.n_of_m(w, inputs, 2, 3)
