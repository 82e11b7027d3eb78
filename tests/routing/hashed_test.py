"""The hash of token ids: fixed, balanced, distinct."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.routing import hashed

experts_of = jax.jit(hashed.experts_of, static_argnums=(1, 2))


@pytest.mark.parametrize('experts, k', [(1, 1), (4, 1), (6, 3), (8, 2), (7, 7), (64, 6)])
def test_every_block_of_ids_meets_each_expert_once_in_each_place(experts, k):
  ids = jnp.arange(experts * 50)
  chosen = np.asarray(experts_of(ids, k, experts)).reshape(50, experts, k)
  want = np.tile(np.arange(experts)[None, :, None], (50, 1, k))
  np.testing.assert_array_equal(np.sort(chosen, axis=1), want)
  rows = chosen.reshape(-1, k)
  assert all(len(set(row)) == k for row in rows.tolist())


def test_blocks_are_shuffled_differently():
  chosen = np.asarray(experts_of(jnp.arange(8 * 400), 2, 8)).reshape(400, 8, 2)
  # First choices of ids = 0 mod 8 are spread over the experts, 50 each give or take 5 sigma (6.6).
  counts = np.bincount(chosen[:, 0, 0], minlength=8)
  assert counts.min() > 17 and counts.max() < 83
  # So is the distance of the second choice, over the 4 strides that are odd.
  steps = np.bincount((chosen[:, 0, 1] - chosen[:, 0, 0]) % 8, minlength=8)
  np.testing.assert_array_equal(steps > 0, [0, 1, 0, 1, 0, 1, 0, 1])
  assert steps[1::2].min() > 57


def test_the_hash_is_fixed():
  """A changed hash would send the tokens of every trained model to other experts."""
  got = experts_of(jnp.array([0, 1, 2, 3, 50_256, 2**31 - 1]), 2, 8)
  np.testing.assert_array_equal(got, FIXED)


FIXED = [[1, 6], [2, 7], [3, 0], [4, 1], [6, 5], [2, 5]]


def test_gates_are_one_losses_zero_and_nothing_reaches_the_router():
  tokens = jnp.array([[3, 1, 3], [0, 0, 2]])
  logits = jax.random.normal(jax.random.key(0), (2, 3, 4))
  routing = jax.jit(lambda z: hashed.route(tokens, z, 2))(logits)
  np.testing.assert_array_equal(routing.gate_mk, np.ones((6, 2)))
  np.testing.assert_array_equal(routing.choice_mk[0], routing.choice_mk[2])
  assert routing.load_balance_loss == 0.0 and routing.z_loss == 0.0
  np.testing.assert_array_equal(routing.candidates_mk, np.ones((6, 2)))
  total = lambda z: sum(
      x.sum() for x in jax.tree.leaves(hashed.route(tokens, z, 2)) if x.dtype == z.dtype
  )
  # logits_me themselves are part of the Routing; nothing else depends on them.
  np.testing.assert_array_equal(jax.jit(jax.grad(total))(logits), np.ones((2, 3, 4)))
  halves = jax.jit(lambda z: hashed.route(tokens, z, 2, normalize=True).gate_mk)(logits)
  np.testing.assert_array_equal(halves, np.full((6, 2), 0.5))


def test_too_many_choices_are_refused():
  with pytest.raises(UserError, match='5 choices among 4 experts'):
    hashed.experts_of(jnp.arange(3), 5, 4)
