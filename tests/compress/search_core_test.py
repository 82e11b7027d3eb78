"""Grid search: a budget is kept as stored, and the error is not worse than the fixed grid's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import account
from moejax.compress import budget, hessian_core, matrix, search_core


@pytest.fixture(scope='module')
def problem():
  keys = jax.random.split(jax.random.key(0), 3)
  w = jax.random.normal(keys[0], (2, 256, 128))
  mix = jax.random.normal(keys[2], (256, 256)) / 16 + 0.5 * jnp.eye(256)
  h = jax.vmap(hessian_core.hessian)(jax.random.normal(keys[1], (2, 600, 256)) @ mix)
  return w, h


def quantized(problem, **settings):
  w, h = problem
  return matrix.quantize_matrices(
      np.asarray(w), h, [600, 600], matrix.Settings(**settings), 'w', [0, 1]
  )


def test_least_error_beats_the_fixed_grid(problem):
  searched = quantized(problem, search=matrix.Search())
  fixed = quantized(problem)
  for a, b in zip(searched.rows, fixed.rows):
    assert a['relative_output_error'] < b['relative_output_error']
    assert a['grid_scale'] < 1.0


def held(problem, target, **changes):
  """Two weights of one shape, one of them much easier, under one budget."""
  w, h = problem
  weights = {'a': np.asarray(w), 'b': np.asarray(w)}
  hessian = {'a': h, 'b': jnp.tile(jnp.eye(256), (2, 1, 1))}
  settings = matrix.Settings(search=matrix.Search(target_bits=target), **changes)
  calls = []

  def run(grids):
    calls.append(grids)
    return {
        name: matrix.quantize_matrices(
            weights[name], hessian[name], [600, 600], settings, name, [0, 1], grids.get(name)
        ) for name in weights
    }

  return budget.within(weights, hessian.__getitem__, settings, run), calls


def bits_and_error(made):
  rows = [row for stored in made.values() for row in stored.rows]
  bits = np.mean([part.weight.bits_per_weight() for m in made.values() for part in m.parts])
  return bits, sum(row['relative_output_error'] for row in rows)


def test_a_budget_is_kept_as_stored_and_used(problem):
  tight, loose = (bits_and_error(held(problem, target)[0]) for target in (0.85, 1.0))
  assert 0.80 < tight[0] <= 0.85 and 0.95 < loose[0] <= 1.0
  assert loose[1] < tight[1]
  (free, error), calls = bits_and_error(held(problem, 9.0)[0]), held(problem, 9.0)[1]
  assert len(calls) == 1 and free > 1.0 and error < loose[1]


def test_an_impossible_budget_takes_the_fewest_bits(problem):
  made, _ = held(problem, 0.01)
  for stored in made.values():
    for row in stored.rows:
      assert row['threshold'] == pytest.approx(0.65) and row['grid_scale'] == 1.0


def test_a_wrong_prediction_is_made_good(problem, monkeypatch):
  real = account.ternary_bits_per_weight
  low = lambda *args, **kwargs: 0.9 * real(*args, **kwargs)
  monkeypatch.setattr(account, 'ternary_bits_per_weight', low)
  made, calls = held(problem, 0.9)
  assert len(calls) > 1 and bits_and_error(made)[0] <= 0.9


def test_choice_under_a_budget_by_hand():
  error = np.array([[1.0, 4.0], [5.0, 9.0]])  # grids x matrices
  bits = np.array([[2.0, 2.0], [1.0, 1.0]])
  size = [10, 10]
  choose = lambda target: search_core.choose(error, bits, size, target).tolist()
  assert choose(None) == choose(2.0) == [0, 0]
  # One must give way: the first would lose 4, the second 5.
  assert choose(1.5) == choose(1.99) == [1, 0]
  assert choose(1.0) == choose(0.5) == [1, 1]
  # The larger matrix saves more for its error.
  assert search_core.choose(error, bits, [10, 30], 1.5).tolist() == [0, 1]
