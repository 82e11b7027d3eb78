"""Grid search: the budget is kept, the error is not worse than the fixed grid's, estimates hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import weights
from moejax.compress import hessian_core, matrix, search_core, size


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


def test_budget_is_kept_as_stored(problem):
  budget = 0.85
  out = quantized(problem, search=matrix.Search(target_bits=budget))
  (part,) = out.parts
  assert isinstance(part.weight, weights.Ternary)
  assert part.weight.bits_per_weight() < 1.02 * budget
  loose = quantized(problem, search=matrix.Search(target_bits=1.5))
  assert loose.rows[0]['relative_output_error'] < out.rows[0]['relative_output_error']


def test_impossible_budget_takes_the_fewest_bits(problem):
  w, h = problem
  choice = search_core.search_grid(w, h, target_bits=0.01, outputs=16)
  np.testing.assert_allclose(choice.threshold, 0.65)
  np.testing.assert_allclose(choice.grid_scale, 1.0)


@pytest.mark.parametrize('storage', ['moejax', 'qmoe_v1'])
@pytest.mark.parametrize('share', [0.8, 0.885, 0.953])
def test_size_estimate_is_within_one_percent(storage, share):
  rng = np.random.default_rng(1)
  shape = (2, 96, 512)
  symbols = np.where(rng.random(shape) < share, 0, rng.integers(1, 3, shape))
  node = weights.Ternary if storage == 'moejax' else weights.TernaryV1
  stored = node.from_symbols(symbols, np.ones((2, 96, 2)) * [-1, 1]).bits_per_weight()
  guess = size.ternary_bits_per_weight(
      float((symbols == 0).mean()), rows=96, cols=512, storage=storage
  )
  assert abs(guess / stored - 1) < 0.01


def test_entropy():
  np.testing.assert_allclose(search_core.entropy([0.885, 1 / 3]), [0.6298, np.log2(3)], atol=1e-4)
