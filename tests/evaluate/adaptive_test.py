"""Adaptive resolution: margins, thresholds, and that the answers are the full model's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.evaluate import adaptive

RNG = np.random.default_rng(0)


def problem(count=300, classes=5, noise=0.6, seed=0):
  rng = np.random.default_rng(seed)
  full = rng.normal(size=(count, classes)).astype(np.float32) * 2
  return full + noise * rng.normal(size=full.shape).astype(np.float32), full


def test_margins():
  scores = np.array([[1.0, 3.0, 2.5], [0.0, 0.0, -1.0]])
  np.testing.assert_allclose(adaptive.margins(scores, False), [0.5, 0.0])
  p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
  np.testing.assert_allclose(adaptive.margins(scores), [p[0, 1] - p[0, 2], 0.0], atol=1e-6)


@pytest.mark.parametrize('probabilities', [True, False])
def test_a_threshold_of_the_largest_margin_changes_no_answer(probabilities):
  cheap, full = problem()
  kwargs = dict(probabilities=probabilities)
  threshold = adaptive.calibrate(cheap, full, **kwargs)
  wrong = cheap.argmax(-1) != full.argmax(-1)
  assert threshold == pytest.approx(
      float(np.asarray(adaptive.margins(cheap, probabilities))[wrong].max()))
  got = adaptive.account(cheap, full, threshold, cost=0.3, **kwargs)
  assert got.agreement == 1 and 0 < got.changed < got.rerun < 1
  assert got.saved == pytest.approx(0.7 - got.rerun)
  fewer = adaptive.account(
      cheap, full, adaptive.calibrate(cheap, full, percentile=80, **kwargs), cost=0.3, **kwargs
  )
  assert fewer.rerun < got.rerun and 1 - got.changed < fewer.agreement <= 1
  assert adaptive.calibrate(full, full) == -1
  assert adaptive.account(full, full, -1.0, cost=0.3).rerun == 0


@pytest.mark.parametrize('count', [1, 7, 40, 300])
def test_the_function_runs_full_where_it_must(count):
  cheap_w, full_w = RNG.normal(size=(6, 4)), RNG.normal(size=(6, 4))
  cheap_w = full_w + 0.3 * cheap_w
  x = RNG.normal(size=(count, 6)).astype(np.float32)
  seen = []
  cheap = lambda x: x @ jnp.asarray(cheap_w, jnp.float32)

  def full(x):
    jax.debug.callback(lambda n: seen.append(int(n)), x.shape[0])
    return x @ jnp.asarray(full_w, jnp.float32)

  run = adaptive.adaptive_resolution(cheap, full, 0.5, buckets=(4, 16, 64))
  scores, again = run(x)
  want = np.where(again[:, None], x @ full_w, x @ cheap_w)
  np.testing.assert_allclose(scores, want, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(again, np.asarray(adaptive.margins(x @ cheap_w)) <= 0.5)
  jax.effects_barrier()
  assert set(seen) <= {4, 16, 64} and sum(seen) >= again.sum()
  broken, rerun = adaptive.adaptive_resolution(lambda x: cheap(x) * jnp.nan, full, 0.5)(x)
  assert rerun.all() and np.isfinite(np.asarray(broken)).all()
  none, never = adaptive.adaptive_resolution(cheap, full, -1.0)(x)
  np.testing.assert_allclose(none, x @ cheap_w, rtol=1e-4, atol=1e-4)
  assert not never.any()


def test_bad_requests():
  cheap, full = problem(4)
  for a, b, words in (
      (cheap[:2], full, 'shapes'), (cheap[:0], full[:0], 'shapes'),
      (cheap * np.nan, full, 'not finite'), (cheap[:, :1], full[:, :1], 'at least 2'),
  ):
    with pytest.raises(UserError, match=words):
      adaptive.calibrate(a, b)
  with pytest.raises(UserError, match='buckets'):
    adaptive.adaptive_resolution(lambda x: x, lambda x: x, 0.5, buckets=())
  with pytest.raises(UserError, match='percentile = 101'):
    adaptive.calibrate(cheap, full, percentile=101)
