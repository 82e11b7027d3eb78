"""Choices led to merged experts: the same sums, each expert met once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import moe
from moejax.routing import remap
from moejax.routing.types import Routing


def routing(choice, gate, keep=None, scale=None, experts=6):
  choice, gate = jnp.asarray(choice, jnp.int32), jnp.asarray(gate, jnp.float32)
  keep = jnp.ones(choice.shape, bool) if keep is None else jnp.asarray(keep)
  return Routing(
      choice_mk=choice, keep_mk=keep, gate_mk=jnp.where(keep, gate, 0),
      logits_me=jnp.zeros((len(choice), experts)), load_e=jnp.arange(experts),
      load_balance_loss=jnp.zeros(()), z_loss=jnp.zeros(()),
      scale_mk=None if scale is None else jnp.asarray(scale, jnp.float32),
  )


def test_by_hand():
  before = routing([[0, 1], [0, 2], [3, 5], [1, 0]], [[0.6, 0.4]] * 4,
                   keep=[[True, True], [True, True], [True, True], [False, True]])
  after = remap.remap(before, [0, 0, 1, 2, 1, 2])
  assert after.choice_mk.tolist() == [[0, 0], [0, 1], [2, 2], [0, 0]]
  assert after.keep_mk.tolist() == [[True, False], [True, True], [True, False], [False, True]]
  np.testing.assert_allclose(after.gate_mk, [[1, 0], [0.6, 0.4], [1, 0], [0, 0.4]], rtol=1e-6)
  assert after.load_e.tolist() == list(range(6))


def test_one_choice_is_only_renamed():
  after = remap.remap(routing([[3], [0]], [[0.5], [0.7]]), [0, 0, 1, 2, 1, 2])
  assert after.choice_mk.tolist() == [[2], [0]]
  np.testing.assert_allclose(after.gate_mk, [[0.5], [0.7]])


@pytest.mark.long(but=('True',))
@pytest.mark.parametrize('scaled', [False, True])
def test_outputs_and_gradients_are_those_of_copies(scaled):
  """A merged expert under a map gives what copies of it in every slot give, for less work."""
  rng = np.random.default_rng(0)
  labels = np.array([0, 1, 0, 2, 1, 0])
  few = {'wi': rng.normal(size=(3, 4, 8)), 'wo': rng.normal(size=(3, 8, 4))}
  few = {name: jnp.asarray(w, jnp.float32) for name, w in few.items()}
  choice = np.argsort(rng.normal(size=(10, 6)), 1)[:, :3]
  keep = rng.random((10, 3)) < 0.8
  scale = rng.random((10, 3)) + 0.5 if scaled else None
  x = jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32)
  gate = jnp.asarray(rng.random((10, 3)), jnp.float32)

  def copies(few, x, gate):
    many = {name: w[labels] for name, w in few.items()}
    return moe.moe_ffn(many, x, routing(choice, gate, keep, scale), 'relu')[0]

  def merged(few, x, gate):
    own = remap.remap(routing(choice, gate, keep, scale), labels)
    return moe.moe_ffn(few, x, own, 'relu')[0]

  np.testing.assert_allclose(
      merged(few, x, gate), copies(few, x, gate), rtol=1e-5, atol=1e-5
  )
  after = remap.remap(routing(choice, gate, keep, scale), labels)
  pairs = {(i, int(c)) for i in range(10) for c, k in zip(labels[choice[i]], keep[i]) if k}
  assert int(after.keep_mk.sum()) == len(pairs) < keep.sum()
  grad = lambda f: jax.grad(lambda *a: (f(*a) ** 2).sum(), argnums=(0, 1, 2))(few, x, gate)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
      grad(merged), grad(copies),
  )
