"""Tokens that travel between devices: equal sums both ways, drops only where buffers overflow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import sharding
from moejax.config import MeshConfig
from moejax.ops import exchange, moe
from moejax.routing import topk

E, D, F, B, T, K = 8, 12, 16, 8, 5, 2


@functools.cache
def problem(skewed=False):
  keys = jax.random.split(jax.random.key(0), 5)
  experts = {
      'wi': 0.3 * jax.random.normal(keys[0], (E, D, F)),
      'gate': 0.3 * jax.random.normal(keys[1], (E, D, F)),
      'wo': 0.3 * jax.random.normal(keys[2], (E, F, D)),
  }
  logits = jax.random.normal(keys[3], (B, T, E))
  if skewed:  # all first choices are expert 7, as are no second ones
    logits = logits.at[..., 7].set(9.0)
  valid = jnp.ones((B, T), bool).at[0, 3:].set(False)
  return experts, jax.random.normal(keys[4], (B, T, D)), topk.route(logits, K, valid_bt=valid)


def run(shape, factor, skewed=False):
  """Output, what was computed, and the gradients of experts and tokens."""
  experts, x, routing = problem(skewed)
  mesh = None if shape is None else sharding.make_mesh(
      MeshConfig(data=shape[0], expert=shape[1], tensor=shape[2])
  )

  def loss(experts, x):
    y, keep = moe.moe_ffn(experts, x, routing, 'silu', mesh=mesh, exchange_factor=factor)
    return jnp.sum(jnp.sin(y)), (y, keep)

  (_, (y, keep)), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(experts, x)
  return np.asarray(y), np.asarray(keep), grads


one_device = functools.cache(functools.partial(run, None, None))


@pytest.mark.long(but=('False-None-shape3', 'True-0.0-shape2'))
@pytest.mark.parametrize('shape', [(1, 8, 1), (2, 4, 1), (2, 2, 2), (8, 1, 1), (1, 1, 4)])
@pytest.mark.parametrize('factor', [None, 0.0])
@pytest.mark.parametrize('skewed', [False, True])
def test_nothing_is_dropped_and_sums_and_gradients_are_one_devices(shape, factor, skewed):
  y, keep, grads = run(shape, factor, skewed)
  want_y, want_keep, want_grads = one_device(skewed)
  np.testing.assert_array_equal(keep, want_keep)
  np.testing.assert_allclose(y, want_y, rtol=2e-5, atol=2e-5)
  for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads)):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_buffers_drop_the_later_pairs_of_a_full_device():
  """8 devices, 1 expert each, 5 tokens a device: all 5 first choices go to one device."""
  _, x, routing = problem(True)
  y, keep, _ = run((1, 8, 1), 1.6, True)
  rows = exchange.buffer_rows(T * K, 8, 1.6)
  assert rows == 2
  choice = np.asarray(routing.choice_mk).reshape(8, T, K)
  wanted = np.asarray(routing.keep_mk).reshape(8, T, K)
  kept = keep.reshape(8, T, K)
  for device in range(8):
    for expert in range(E):
      there = (choice[device] == expert) & wanted[device]
      assert kept[device][there].sum() == min(rows, there.sum())
      assert kept[device][there][:rows].all()  # in order of position
  assert (~kept & wanted).sum() > 8
  experts = problem(True)[0]
  again, _ = moe.moe_ffn(experts, x, routing.kept(jnp.asarray(keep)), 'silu')
  np.testing.assert_allclose(y, again, rtol=2e-5, atol=2e-5)
  counts = np.bincount(np.asarray(routing.choice_mk)[keep], minlength=E)
  np.testing.assert_array_equal(routing.kept(jnp.asarray(keep)).load_e, counts)


@pytest.mark.parametrize('pairs, ways, factor, rows', [
    (10, 4, 0.0, 10), (10, 4, 1.0, 3), (10, 4, 2.0, 5), (10, 4, 100.0, 10), (1, 8, 1.0, 1),
])
def test_rows_of_a_buffer(pairs, ways, factor, rows):
  assert exchange.buffer_rows(pairs, ways, factor) == rows


def test_collectives_are_the_ones_each_way_promises():
  experts, x, routing = problem()
  mesh = sharding.make_mesh(MeshConfig(data=1, expert=8))

  def text(factor):
    fn = lambda e, x: moe.moe_ffn(e, x, routing, 'silu', mesh=mesh, exchange_factor=factor)[0]
    return jax.jit(fn).lower(experts, x).as_text()

  assert 'all_to_all' in text(0.0) and 'reduce_scatter' not in text(0.0)
  assert 'reduce_scatter' in text(None) and 'all_to_all' not in text(None)
