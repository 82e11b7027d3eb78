"""Candidates and stages, worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.routing import draws as draws_lib
from moejax.routing import stages

candidates = jax.jit(stages.candidates, static_argnums=(2, 3))
choose = jax.jit(stages.choose, static_argnums=1, static_argnames=('eps',))


def keep(logits, eps, variant='reference'):
  logits = jnp.array([logits])
  return np.asarray(candidates(logits, jnp.ones(logits.shape, bool), eps, variant))[0]


def test_candidates_are_near_the_largest_relative_to_its_size():
  # 2 eps = 0.1, largest 2: the band is 0.1 * max(|z|, 2) = 0.2. 1.9 and 1.81 are inside, 1.75 not.
  np.testing.assert_array_equal(keep([2.0, 1.9, 1.81, 1.75], 0.05), [1, 1, 1, 0])
  # An offset of 50 widens the band to 5.2.
  np.testing.assert_array_equal(keep([52.0, 51.9, 51.81, 51.75], 0.05), [1, 1, 1, 1])


def test_band_of_negative_logits_is_their_own_size():
  # Largest -1: max(|z|, -1) = |z|. -1.1 is 0.1 away, band 0.11; -1.2 is 0.2 away, band 0.12.
  np.testing.assert_array_equal(keep([-1.0, -1.1, -1.2], 0.05), [1, 1, 0])


def test_the_papers_band_is_the_narrower_one():
  # 0.9 apart. Code: 2 * 0.5 * max(0.1, 1) = 1. Paper: 0.5 * (0.1 + 1) = 0.55.
  np.testing.assert_array_equal(keep([1.0, 0.1], 0.5), [1, 1])
  np.testing.assert_array_equal(keep([1.0, 0.1], 0.5, 'paper'), [1, 0])


@pytest.mark.parametrize('variant', ['reference', 'paper'])
def test_zero_rows_and_ties_keep_all_that_tie(variant):
  np.testing.assert_array_equal(keep([0.0, 0.0, 0.0], 0.01, variant), [1, 1, 1])
  np.testing.assert_array_equal(keep([3.0, 3.0, 1.0], 0.01, variant), [1, 1, 0])
  np.testing.assert_array_equal(keep([0.0, -0.5, -7.0], 0.0, variant), [1, 0, 0])


def test_second_stage_starts_from_what_is_left():
  # Band 0.2 leaves experts 0 and 1; then the largest is 1.9, band 0.19, and 1.0 is 0.9 away.
  first, second = choose(jnp.array([[2.0, 1.9, 1.0]]), 2, eps=0.05)
  assert first.choice_m[0] == 0 and second.choice_m[0] == 1
  p = 1 / (1 + np.exp(-0.1))
  np.testing.assert_allclose(first.probs_me, [[p, 1 - p, 0.0]], rtol=1e-6)
  np.testing.assert_array_equal(second.probs_me, [[0.0, 1.0, 0.0]])
  np.testing.assert_array_equal(stages.candidate_counts([first, second]), [[2, 1]])


def test_a_draw_takes_the_expert_out_of_the_next_stage():
  # -log of the draws (1, 1/e^3, 1) adds 3 to expert 1, so it wins at 2 + 3; then 0 is the largest.
  logits = jnp.array([[4.0, 2.0, 0.0]])
  recorded = draws_lib.Draws(
      exponential=jnp.array([[[1.0, np.exp(-3.0), 1.0]]] * 2), uniform=jnp.zeros((2, 1))
  )
  first, second = choose(logits, 2, draws=recorded)
  assert first.choice_m[0] == 1 and first.best_m[0] == 0 and second.choice_m[0] == 0
  want = np.exp(4.0) / (np.exp(4.0) + 1.0)
  np.testing.assert_allclose(second.probs_me, [[want, 0.0, 1 - want]], rtol=1e-5)


def test_as_many_choices_as_experts_is_a_permutation():
  logits = jax.random.normal(jax.random.key(0), (50, 4))
  made = choose(logits, 4, draws=draws_lib.from_key(jax.random.key(1), 4, 50, 4))
  np.testing.assert_array_equal(np.sort(stages.choices(made), -1), np.tile(np.arange(4), (50, 1)))
  np.testing.assert_array_equal(made[3].probs_me.max(-1), 1.0)


@pytest.mark.parametrize('k', [0, 4])
def test_too_many_choices_are_refused(k):
  with pytest.raises(UserError, match=f'{k} choices among 3 experts'):
    stages.choose(jnp.zeros((2, 3)), k)
