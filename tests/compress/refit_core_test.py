"""Refitted levels lower the output error, never raise it, and leave degenerate rows alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.compress import gptq_core, hessian_core, refit_core


def problem(tokens, inputs=64, outputs=24):
  keys = jax.random.split(jax.random.key(tokens), 3)
  w = jax.random.normal(keys[0], (2, inputs, outputs))
  mix = jax.random.normal(keys[2], (inputs, inputs)) / 8 + 0.5 * jnp.eye(inputs)
  h = jax.vmap(hessian_core.hessian)(jax.random.normal(keys[1], (2, tokens, inputs)) @ mix)
  return w, h


def values(quantized, levels, bits):
  if bits == 'ternary':
    low, high = levels[:, None, :, 0], levels[:, None, :, 1]
    return jnp.where(quantized.symbols == 2, high, jnp.where(quantized.symbols == 1, low, 0.0))
  return levels[:, None, :, 0] * (quantized.symbols - levels[:, None, :, 1])


@pytest.mark.parametrize('bits', ['ternary', 2, 3, 4])
@pytest.mark.parametrize('method', ['gptq', 'rtn'])
@pytest.mark.parametrize('tokens', [3, 40, 500])
@pytest.mark.parametrize('gain_weight', [0.0, 10.0])
def test_refit_never_raises_the_error_it_reports(bits, method, tokens, gain_weight):
  w, h = problem(tokens)
  q = gptq_core.rtn(w, bits) if method == 'rtn' else gptq_core.gptq(w, h, bits)
  fit = refit_core.refit(w, h, q, gain_weight=gain_weight)
  assert (fit.error_after <= fit.error_before).all()
  assert fit.error_after.sum() < fit.error_before.sum()
  exact = hessian_core.quadratic(h, w - values(q, fit.levels, bits))
  np.testing.assert_allclose(fit.error_after.sum(), exact.sum(), rtol=2e-3)
  left = jnp.sum(jnp.einsum('edc,ecf->edf', h, w) * (w - values(q, fit.levels, bits)), axis=1)
  scale = hessian_core.quadratic(h, w)
  np.testing.assert_allclose(fit.gain_error / scale, left / scale, atol=1e-5)
  rounded = fit.levels.astype(jnp.bfloat16).astype(jnp.float32)
  np.testing.assert_array_equal(fit.levels, rounded)


def test_ternary_refit_gains_a_fifth():
  """The synthetic layer of the literature: about 22 % less error at no bits."""
  w, h = problem(500, 192, 96)
  fit = refit_core.refit(w, h, gptq_core.gptq(w, h, 'ternary'))
  assert fit.error_after.sum() < 0.85 * fit.error_before.sum()


def test_refit_solves_the_normal_equations():
  w, h = problem(500)
  q = gptq_core.gptq(w, h, 'ternary')
  fit = refit_core.refit(w, h, q, ridge=0.0, level_dtype=jnp.float32)
  for output in (0, 7):
    basis = np.stack([q.symbols[0, :, output] == 1, q.symbols[0, :, output] == 2], 1).astype(float)
    metric = np.asarray(h[0], float)
    want = np.linalg.solve(basis.T @ metric @ basis, basis.T @ metric @ w[0, :, output])
    np.testing.assert_allclose(fit.levels[0, output], want, rtol=1e-3)


def test_degenerate_rows_keep_finite_levels():
  w, h = problem(40)
  w = w.at[:, :, 0].set(0.0).at[:, :, 1].set(jnp.abs(w[:, :, 1]))
  h = h.at[1].set(0.0)
  q = gptq_core.gptq(w, h, 'ternary')
  fit = refit_core.refit(w, h, q)
  assert jnp.isfinite(fit.levels).all()
  assert (fit.levels[..., 0] <= 0).all() and (fit.levels[..., 1] >= 0).all()
  np.testing.assert_array_equal(fit.levels[:, 0], [[-1.0, 1.0]] * 2)


def test_disabled_only_rounds():
  w, h = problem(40)
  q = gptq_core.gptq(w, h, 'ternary')
  fit = refit_core.refit(w, h, q, enabled=False)
  np.testing.assert_array_equal(fit.levels[..., 0], q.grid.low[:, 0].astype(jnp.bfloat16))
  np.testing.assert_array_equal(fit.error_after, fit.error_before)


@pytest.mark.parametrize('bits', ['ternary', 2])
def test_least_squares_shrinks_the_output_and_the_gain_weight_holds_it(bits):
  w, h = problem(500, 192, 96)
  q = gptq_core.gptq(w, h, bits)
  size = hessian_core.quadratic(h, w).sum()
  missing = lambda weight: float(
      refit_core.refit(w, h, q, gain_weight=weight).gain_error.sum() / size
  )
  least_squares, held = missing(0.0), missing(10.0)
  # The fit is orthogonal to its error, so what is missing is exactly the error.
  error = refit_core.refit(w, h, q, ridge=0.0, level_dtype=jnp.float32).error_after.sum() / size
  assert least_squares > 0.9 * error > 0
  assert abs(held) < 0.5 * least_squares
