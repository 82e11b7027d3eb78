"""Grouped matmul against a plain loop, its gradients, and what it compiles to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import ref as grouped
from moejax.ops import expert_dot as expert_dot_lib
from moejax.ops import ffn
from moejax.routing import dispatch

SIZES = [
    [3, 0, 5, 1],
    [0, 0, 0, 0],
    [600, 0, 0, 0],
    [0, 0, 0, 1],
    [257, 31, 33, 300],
    [1, 1, 1, 1],
]


def reference(x, w, sizes):
  y = np.zeros((x.shape[0], w.shape[2]), np.float64)
  start = 0
  for e, size in enumerate(sizes):
    y[start : start + size] = np.float64(x[start : start + size]) @ np.float64(w[e])
    start += size
  return y


def make(sizes, extra=7, d=24, f=40):
  m = sum(sizes) + extra
  keys = jax.random.split(jax.random.key(m), 3)
  x = jax.random.normal(keys[0], (m, d))
  w = jax.random.normal(keys[1], (len(sizes), d, f))
  dy = jax.random.normal(keys[2], (m, f))
  return x, w, dy, jnp.array(sizes, jnp.int32)


@pytest.mark.parametrize('sizes', SIZES)
def test_equals_a_plain_loop_and_zeroes_the_rest(sizes):
  x, w, _, group_sizes = make(sizes)
  y = jax.jit(expert_dot_lib.expert_dot)(x, w, group_sizes)
  np.testing.assert_allclose(y, reference(np.asarray(x), np.asarray(w), sizes), atol=2e-5)
  assert not np.any(np.asarray(y)[sum(sizes):])


@pytest.mark.parametrize('sizes', SIZES)
def test_gradients_equal_those_of_a_masked_einsum(sizes):
  x, w, dy, group_sizes = make(sizes)
  owner = np.repeat(np.arange(len(sizes) + 1), [*sizes, x.shape[0] - sum(sizes)])
  onehot = jax.nn.one_hot(owner, len(sizes))

  def masked(x, w):
    return (jnp.einsum('me,md,edf->mf', onehot, x, w) * dy).sum()

  def ours(x, w):
    return (expert_dot_lib.expert_dot(x, w, group_sizes) * dy).sum()

  for a, b in zip(jax.grad(ours, (0, 1))(x, w), jax.grad(masked, (0, 1))(x, w)):
    np.testing.assert_allclose(a, b, atol=1e-3)


def test_one_row():
  x, w, _, _ = make([0, 1], extra=0)
  y = expert_dot_lib.expert_dot(x, w, jnp.array([0, 1], jnp.int32))
  np.testing.assert_allclose(y[0], np.asarray(x[0]) @ np.asarray(w[1]), atol=1e-5)


def test_bfloat16_accumulates_in_float32():
  x, w, _, group_sizes = make([40, 24], d=512)
  y = expert_dot_lib.expert_dot(x.astype(jnp.bfloat16), w, group_sizes)
  assert y.dtype == jnp.bfloat16
  exact = reference(np.asarray(x.astype(jnp.bfloat16), np.float32),
                    np.asarray(w.astype(jnp.bfloat16), np.float32), [40, 24])
  error = np.abs(np.asarray(y, np.float64) - exact)
  assert error.max() <= 2**-8 * np.abs(exact).max()


def test_experts_without_tokens_are_never_read():
  x, w, _, group_sizes = make([4, 0, 3])
  poisoned = w.at[1].set(jnp.nan)
  assert np.isfinite(np.asarray(expert_dot_lib.expert_dot(x, poisoned, group_sizes))).all()


def test_memory_holds_no_expansion_over_experts():
  experts, d, f, m = 64, 128, 256, 512
  args = (
      jax.ShapeDtypeStruct((m, d), jnp.float32),
      jax.ShapeDtypeStruct((experts, d, f), jnp.float32),
      jax.ShapeDtypeStruct((experts,), jnp.int32),
  )
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  compiled = jax.jit(expert_dot_lib.expert_dot, in_shardings=device).lower(*args).compile()
  one_expert = 4 * d * f
  rows = 4 * (m + grouped.LARGE_ROWS) * (d + 2 * f)
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * one_expert + 2 * rows


def test_shapes_that_do_not_fit_are_named():
  x, w, _, group_sizes = make([1, 1])
  with pytest.raises(ValueError, match=r'\(9, 24\).*\(2, 24, 40\)'):
    expert_dot_lib.expert_dot(x, w, group_sizes[:1])


def test_expert_ffn_equals_each_expert_alone():
  keys = jax.random.split(jax.random.key(0), 5)
  e, d, f, m = 4, 16, 24, 50
  params = {
      'wi': jax.random.normal(keys[0], (e, d, f)),
      'gate': jax.random.normal(keys[1], (e, d, f)),
      'wo': jax.random.normal(keys[2], (e, f, d)),
  }
  x = jax.random.normal(keys[3], (m, d))
  choice = jax.random.randint(keys[4], (m, 2), 0, e)
  keep = jnp.arange(2 * m).reshape(m, 2) % 7 != 3
  y = dispatch.apply_experts(
      x, choice, keep, e, lambda rows, sizes, _: ffn.expert_ffn(params, rows, sizes, 'gelu_new')
  )
  alone = jax.jit(lambda w, x: ffn.dense_ffn(w, x, 'gelu_new'))
  for i in range(m):
    for j in range(2):
      one = {name: w[choice[i, j]] for name, w in params.items()}
      expected = alone(one, x[i][None])[0] * keep[i, j]
      np.testing.assert_allclose(y[i, j], expected, atol=1e-3, rtol=1e-4)
