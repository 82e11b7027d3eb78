"""Capacity, worked by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import capacity


def test_first_choices_are_served_before_second_ones():
  # One sequence; places 0..3 choose (first, second) = (0, 1), (1, 0), (0, 1), (1, 0); capacity 3.
  # Expert 0: first choices of places 0, 2, then second choices of places 1, 3: the last is over.
  # Expert 1: first choices of places 1, 3, then second choices of 0, 2: the last is over.
  choice = jnp.array([[[0, 1], [1, 0], [0, 1], [1, 0]]])
  keep = capacity.mask(choice, jnp.ones(choice.shape, bool), 2, 3)
  np.testing.assert_array_equal(keep[0], [[1, 1], [1, 1], [1, 0], [1, 0]])
  # Capacity 1: the first choice of place 0 and of place 1 alone.
  keep = capacity.mask(choice, jnp.ones(choice.shape, bool), 2, 1)
  np.testing.assert_array_equal(keep[0], [[1, 0], [1, 0], [0, 0], [0, 0]])


def test_sequences_are_apart_and_what_does_not_count_takes_no_place():
  choice = jnp.zeros((2, 3, 1), jnp.int32)
  counted = jnp.array([[[True], [True], [True]], [[False], [True], [True]]])
  keep = capacity.mask(choice, counted, 2, 2) & counted
  np.testing.assert_array_equal(keep[..., 0], [[1, 1, 0], [0, 1, 1]])


@pytest.mark.parametrize('factor, length, k, experts, want', [
    (1.0, 8, 1, 4, 2),     # an even share
    (1.25, 8, 1, 4, 3),    # 2.5, rounded up
    (1.25, 8, 2, 4, 5),    # two choices a token
    (1.1, 100, 1, 10, 11), # 11.000000000000002 in floating point
    (0.1, 4, 1, 8, 1),     # at least one
])
def test_tokens_of_a_factor(factor, length, k, experts, want):
  assert capacity.tokens(factor, length, k, experts) == want
