"""Activations against their formulas."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import ffn


@pytest.mark.parametrize('dtype', (jnp.float32, jnp.bfloat16), ids=lambda d: jnp.dtype(d).name)
def test_gelu_keeps_the_digits_of_its_dtype(dtype):
  x = jnp.linspace(-3.0, 3.0, 61).astype(dtype)
  want = [0.5 * v * math.erfc(-v / math.sqrt(2)) for v in np.asarray(x, np.float64)]
  got = ffn.hidden_units('gelu', x)
  assert got.dtype == dtype
  step = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-14  # 1 + erf at -3 leaves 15 bits.
  np.testing.assert_allclose(np.float64(got), want, rtol=step, atol=0)
