"""LowRankSparse: the dense weight it stands for, the work it does, gradients, files, shards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import errors, weights
from moejax.ops import expert_dot as expert_dot_lib
from moejax.weights import lowrank_core

E, D, F, R = 3, 20, 36, 4


def make(seed=0, share=0.3, dtype=np.float32):
  rng = np.random.default_rng(seed)
  w = rng.normal(size=(E, D, F)).astype(np.float32)
  left, right, rest = (np.asarray(a) for a in lowrank_core.split(w, R))
  keep = rng.random((E, F)) < share
  keep[1] = False
  dense = left @ right + rest * keep[:, None]
  return weights.LowRankSparse.from_dense(left, right, rest, keep, dtype), dense, keep


def test_it_is_the_dense_weight():
  node, dense, keep = make()
  assert node.shape == (E, D, F)
  np.testing.assert_allclose(node.dense(jnp.float32), dense, atol=1e-5)
  assert node.index.shape[1] == keep.sum(1).max()
  assert node.bits() == 32 * (E * R * (D + F) + E * node.index.shape[1] * (D + 1))


@pytest.mark.parametrize('sizes', ((5, 0, 40), (1, 0, 0), (0, 0, 0), (100, 100, 93)))
def test_expert_dot_is_that_of_the_dense_weight(sizes):
  node, dense, _ = make()
  rows = sum(sizes) + 2
  x = jnp.asarray(np.random.default_rng(1).normal(size=(rows, D)), jnp.float32)
  sizes = jnp.asarray(sizes, jnp.int32)
  got = jax.jit(expert_dot_lib.expert_dot)(x, node, sizes)
  want = expert_dot_lib.expert_dot(x, jnp.asarray(dense), sizes)
  np.testing.assert_allclose(got, want, atol=2e-4)


def test_gradients_are_those_of_the_dense_weight():
  node, dense, _ = make()
  x = jnp.asarray(np.random.default_rng(1).normal(size=(30, D)), jnp.float32)
  sizes = jnp.asarray((12, 8, 10), jnp.int32)
  target = jnp.asarray(np.random.default_rng(2).normal(size=(30, F)), jnp.float32)
  loss = lambda x, w: jnp.sum(expert_dot_lib.expert_dot(x, w, sizes) * target)
  dx, dnode = jax.grad(loss, (0, 1), allow_int=True)(x, node)
  wx, dw = jax.grad(loss, (0, 1))(x, jnp.asarray(dense))
  np.testing.assert_allclose(dx, wx, atol=2e-4)
  np.testing.assert_allclose(
      dnode.left, np.einsum('edf,erf->edr', dw, node.right), rtol=1e-3, atol=1e-3
  )
  for e in range(E):
    own = node.index[e] < F
    np.testing.assert_allclose(
        np.asarray(dnode.kept)[e][:, own], np.asarray(dw)[e][:, node.index[e][own]], atol=1e-3
    )


def flops(fn, *args):
  return jax.jit(fn).lower(*args).compile().cost_analysis()['flops']


def test_it_does_the_small_work_only():
  """Compiled operations of one expert's block: r (d + f) + s d products instead of d f."""
  rng = np.random.default_rng(0)
  d, f, r, s, m = 128, 512, 8, 51, 256
  keep = np.zeros((1, f), bool)
  keep[0, rng.choice(f, s, replace=False)] = True
  node = weights.LowRankSparse.from_dense(
      rng.normal(size=(1, d, r)).astype(np.float32), rng.normal(size=(1, r, f)).astype(np.float32),
      rng.normal(size=(1, d, f)).astype(np.float32), keep,
  )
  x, sizes = jnp.zeros((m, d)), jnp.asarray([m], jnp.int32)
  small = flops(lambda x: expert_dot_lib.expert_dot(x, node, sizes), x)
  whole = flops(lambda x: expert_dot_lib.expert_dot(x, jnp.zeros((1, d, f)), sizes), x)
  share = (r * (d + f) + s * d) / (d * f)
  assert share < 0.19
  assert small / whole < share * 1.15


def test_arrays_and_back():
  node, _, _ = make()
  again = weights.LowRankSparse.from_arrays(node.static(), node.to_arrays())
  for a, b in zip(jax.tree.leaves(node), jax.tree.leaves(again)):
    np.testing.assert_array_equal(a, b)
  both = weights.LowRankSparse.concat([node.take([2]), node.take([0, 1])])
  np.testing.assert_allclose(
      both.dense(jnp.float32), np.asarray(node.dense(jnp.float32))[[2, 0, 1]], atol=1e-6
  )


def test_the_kept_columns_may_be_a_node():
  node, _, _ = make(share=0.9)
  width = node.index.shape[1]
  rng = np.random.default_rng(3)
  symbols = rng.integers(0, 16, (E, width, D))
  packed = weights.Packed.from_symbols(
      symbols, np.full((E, width), 0.1, np.float32), np.full((E, width), 8.0, np.float32), bits=4
  )
  mixed = dataclasses.replace(node, kept=packed)
  again = weights.LowRankSparse.from_arrays(mixed.static(), mixed.to_arrays())
  assert isinstance(again.kept, weights.Packed)
  assert again.bits() == mixed.bits() < node.bits()
  x, sizes = jnp.ones((9, D)), jnp.asarray((3, 3, 3), jnp.int32)
  np.testing.assert_allclose(
      expert_dot_lib.expert_dot(x, again, sizes),
      expert_dot_lib.expert_dot(x, again.dense(jnp.float32), sizes), atol=1e-4,
  )


@pytest.mark.parametrize('field, change, message', (
    ('index', lambda a: a + 100, 'names outputs from'),
    ('kept', lambda a: a[:, :, :1], 'must be'),
    ('right', lambda a: a[:, :1], 'right has shape'),
))
def test_arrays_that_contradict_each_other(field, change, message):
  node, _, _ = make()
  arrays = node.to_arrays()
  name = f'{field}.array' if field == 'kept' else field
  with pytest.raises(errors.UserError, match=message):
    weights.LowRankSparse.from_arrays(node.static(), {**arrays, name: change(arrays[name])})
