"""The product with a weight: few rows go by C++ where one device has the CPU to itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import linear as module
from moejax.ops.linear import linear


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


@pytest.mark.parametrize('rows', (0, module.FEW_ROWS + 1))
def test_other_rows_go_by_xla(rows, one_device):
  x, w = drawn(rows)
  assert not foreign(linear, x, w)
  assert linear(x, w).shape == (rows, 3, 24)


def test_several_devices_go_by_xla():
  assert jax.device_count() > 1
  assert not foreign(linear, *drawn(5))
