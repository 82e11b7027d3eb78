"""Grid search: the budget is kept, and the error is not worse than the fixed grid's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import weights
from moejax.compress import hessian_core, matrix, search_core


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


def test_entropy():
  np.testing.assert_allclose(search_core.entropy([0.885, 1 / 3]), [0.6298, np.log2(3)], atol=1e-4)
