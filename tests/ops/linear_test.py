"""The product with a weight: few rows go by C++ where one device has the CPU to itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import few_rows
from moejax.ops.linear import linear, tied_logits


@pytest.fixture
def one_device(monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: 1)


def drawn(rows, dtype=jnp.float32):
  rng = np.random.default_rng(rows)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  return normal(rows, 40), normal(40, 3, 24)


def foreign(fn, *args):
  anew = lambda *args: fn(*args)  # jit knows a function that it has traced.
  return 'moejax_grouped_product' in jax.jit(anew).lower(*args).as_text()


@pytest.mark.parametrize('rows', (1, 5, 14))
@pytest.mark.parametrize('dtype', (jnp.float32, jnp.bfloat16))
def test_few_rows(rows, dtype, one_device):
  x, w = drawn(rows, dtype)
  assert foreign(linear, x, w)
  y = linear(x, w)
  assert y.shape == (rows, 3, 24) and y.dtype == dtype
  exact = np.einsum('md,dnh->mnh', np.float64(x), np.float64(w))
  bound = 2.0**-8 * np.abs(exact).max() if dtype == jnp.bfloat16 else 1e-5
  np.testing.assert_allclose(np.float64(y), exact, atol=bound)
  wide = linear(x, w, preferred=jnp.float32)
  assert wide.dtype == jnp.float32
  np.testing.assert_allclose(wide, exact, atol=1e-5)


def test_it_is_differentiable_in_both_modes(one_device):
  x, w = drawn(5)
  loss = lambda fn, x, w: jnp.sin(fn(x, w)).sum()
  plain = lambda x, w: jnp.einsum('md,dnh->mnh', x, w)
  for derive in (jax.grad, jax.jacfwd):
    found, expected = (
        derive(functools.partial(loss, fn), argnums=(0, 1))(x, w) for fn in (linear, plain)
    )
    for a, b in zip(found, expected):
      np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_constant_operand_has_no_term(one_device):
  x, w = drawn(5)
  endless = x.at[0, 0].set(jnp.inf)  # Times a zero it would be no number.
  _, tangent = jax.jvp(lambda x: linear(x, w), (endless,), (x,))
  np.testing.assert_allclose(tangent, linear(x, w), atol=1e-5)


@pytest.mark.parametrize('axes', ((0, None), (None, 0), (0, 0)))
def test_a_batch_of_products_is_one_in_xla(axes, one_device):
  x, w = drawn(5)
  given = [jnp.stack([a, 2 * a, -a]) if axis == 0 else a for a, axis in zip((x, w), axes)]
  run = jax.vmap(linear, axes)
  assert not foreign(run, *given)
  each = [linear(*(a[i] if axis == 0 else a for a, axis in zip(given, axes))) for i in range(3)]
  np.testing.assert_allclose(run(*given), jnp.stack(each), atol=1e-4)


def test_a_tied_embedding_is_not_transposed(one_device):
  x, embedding = jnp.ones((2, 1, 40)), jnp.ones((96, 40), jnp.bfloat16)
  assert not foreign(tied_logits, x, embedding)
  y = tied_logits(x, embedding)
  assert y.shape == (2, 1, 96) and y.dtype == jnp.float32
  np.testing.assert_array_equal(y, jnp.full(y.shape, 40.0))


@pytest.mark.parametrize('rows', (0, few_rows.MOST + 1))
def test_other_rows_go_by_xla(rows, one_device):
  x, w = drawn(rows)
  assert not foreign(linear, x, w)
  assert linear(x, w).shape == (rows, 3, 24)


def test_several_devices_go_by_xla():
  assert jax.device_count() > 1
  assert not foreign(linear, *drawn(5))
