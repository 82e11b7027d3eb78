"""Scores and rules of split layers: recorded masks, formulas, and what defines a rule."""

from pathlib import Path

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.routing import choice, threshold

VECTORS = Path(__file__).parents[1] / 'vectors' / 'moefication'
scores = jax.jit(choice.scores, static_argnames='kind')
top = jax.jit(choice.top, static_argnames='k')
within = jax.jit(choice.within, static_argnames='limit')
cumulative = jax.jit(choice.cumulative, static_argnames='limit')
above = jax.jit(choice.above, static_argnames='limit')
RNG = np.random.default_rng(0)
X = RNG.standard_normal((7, 5)).astype(np.float32)


def _normal(*shape):
  return RNG.standard_normal(shape).astype(np.float32)


def test_linear_kinds():
  p = {'kernel': _normal(5, 4), 'bias': _normal(4)}
  want = X.astype(np.float64) @ p['kernel'] + p['bias']
  np.testing.assert_allclose(scores(p, X, 'linear'), want, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
      scores({'kernel': p['kernel']}, X, 'linear'), want - p['bias'], rtol=1e-5, atol=1e-6
  )
  unit = X / np.linalg.norm(X, axis=1, keepdims=True)
  got = scores(p, X, 'unit_linear')
  np.testing.assert_allclose(got, unit @ p['kernel'] + p['bias'], rtol=1e-5, atol=1e-6)
  half = scores(p, jnp.asarray(X, jnp.bfloat16), 'unit_linear')
  assert got.dtype == half.dtype == np.float32
  np.testing.assert_allclose(half, got, atol=0.03)


def test_mlp_is_the_published_one():
  z = np.load(VECTORS / 'mlp_router_sparse_E16.npz')
  x = np.load(VECTORS / 'fixture_sparse.npz')['X']
  for w0, w2 in ((z['init_w0'], z['init_w2']), (z['refrun_final_w0'], z['refrun_final_w2'])):
    got = scores({'kernel': w0.T, 'out': w2.T}, x, 'mlp')
    np.testing.assert_allclose(got, np.tanh(z['x_unit'] @ w0.T) @ w2.T, atol=2e-6)
  got = scores({'kernel': z['init_w0'].T, 'out': z['init_w2'].T}, x, 'mlp')
  np.testing.assert_allclose(got, z['init_logits'], atol=1e-6)


def test_norm():
  p = {'kernel': _normal(5, 6), 'bias': _normal(6), 'out': _normal(6, 4), 'out_bias': _normal(4)}
  want = np.abs(np.maximum(X @ p['kernel'] + p['bias'], 0) @ p['out'] + p['out_bias'])
  got = scores(p, X, 'norm')
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  signed = np.maximum(X @ p['kernel'] + p['bias'], 0) @ p['out'] + p['out_bias']
  assert (signed < 0).any() and (got >= 0).all()


def test_swiglu_is_cmoes():
  z = np.load(VECTORS / 'cmoe_swiglu.npz')
  rows = [z[name][z['representatives']] for name in ('Wg', 'Wu')]
  gate, up = ((w / np.linalg.norm(w, axis=1, keepdims=True)).T for w in rows)
  got = scores({'kernel': gate, 'up': up}, z['x'].reshape(-1, 32), 'swiglu')
  want = z['router_probs'].reshape(-1, 6)
  np.testing.assert_allclose(jax.nn.softmax(got, -1), want, atol=1e-5)


def test_a_token_of_zeros_or_of_any_size_is_finite():
  x = np.stack([np.zeros(5), X[0], X[0] * 1e30, X[0] * 1e-30]).astype(np.float32)
  p = {'kernel': _normal(5, 4), 'out': np.eye(4, dtype=np.float32)}
  got = np.asarray(scores(p, x, 'mlp'))
  np.testing.assert_array_equal(got[0], 0.0)
  np.testing.assert_allclose(got[2:], np.broadcast_to(got[1], (2, 4)), rtol=1e-5)
  slope = jax.grad(lambda x: choice.scores(p, x, 'mlp').sum())(x[:2])
  assert np.isfinite(slope).all() and (slope[1] != 0).any()


def test_routers_that_cannot_be():
  with pytest.raises(UserError, match=r"kind = 'lineal'.*did you mean 'linear'"):
    choice.scores({}, X, 'lineal')
  with pytest.raises(UserError, match=r"'norm' needs .*\['out', 'out_bias'\] are not there"):
    choice.scores({'kernel': 0, 'bias': 0}, X, 'norm')


@pytest.mark.parametrize('tau', [0.1, 0.5, 0.9])
def test_dynamic_k_is_the_published_one(tau):
  z = np.load(VECTORS / 'd2dmoe_gate.npz')
  n = z['norms'].reshape(-1, 16)
  for rule, name in ((within, 'dynk_max'), (cumulative, 'dynk')):
    want = z[f'{name}_tau{tau}'].reshape(-1, 16)
    np.testing.assert_array_equal(rule(n, tau), want)


def test_tau_of_one_runs_all_and_of_zero_the_best():
  z = np.load(VECTORS / 'd2dmoe_gate.npz')
  n = z['norms'].reshape(-1, 16)
  np.testing.assert_array_equal(within(n, 1.0), z['dynk_max_tau1.0'].reshape(-1, 16))
  for scores_me in (n, -n, n - n.mean()):
    for rule in (within, cumulative):
      assert rule(scores_me, 1.0).all()
      assert rule(scores_me, jnp.float32(1.0)).all()
      assert rule(scores_me, 0.3).any(-1).all()
  for rule in (within, cumulative):
    np.testing.assert_array_equal(rule(n, 0.0), top(n, k=1))
    assert rule(np.zeros((2, 3), np.float32), 0.5).all()


def test_top_takes_the_lower_index_of_ties():
  s = jnp.array([[1.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-1.0, -3.0, -2.0, -1.0]])
  want = {1: [[0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]],
          2: [[0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 1]],
          4: [[1] * 4] * 3}
  for k, mask in want.items():
    np.testing.assert_array_equal(top(s, k=k), np.array(mask, bool))
  for k in (0, 5):
    with pytest.raises(UserError, match=f'k = {k} of 4 experts: between 1 and 4'):
      top(s, k=k)


def test_rules_by_hand_and_their_limits():
  s = jnp.array([[8.0, 1.0, 5.0, 2.0]])
  masks = lambda m: np.asarray(m[0]).astype(int).tolist()
  assert masks(within(s, 0.375)) == [1, 0, 1, 0]
  assert masks(within(s, 0.3)) == [1, 0, 0, 0]
  assert masks(within(s, 0.8, limit=2)) == [1, 0, 1, 0]
  assert masks(cumulative(s, 0.5)) == [1, 0, 0, 0]
  assert masks(cumulative(s, 0.51)) == [1, 0, 1, 0]
  assert masks(cumulative(s, 0.82)) == [1, 0, 1, 1]
  assert masks(cumulative(s, 1.0, limit=2)) == [1, 0, 1, 0]
  assert masks(above(s, 2.0)) == [1, 0, 1, 0]
  assert masks(above(s, 0.0, limit=3)) == [1, 0, 1, 1]
  assert masks(above(s, 9.0)) == [0, 0, 0, 0]
  assert masks(above(s, 9.0, limit=1)) == [0, 0, 0, 0]


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(st.integers(0, 2**31), st.floats(0.05, 0.95))
def test_no_smaller_set_reaches_the_share(seed, tau):
  s = np.random.default_rng(seed).random((12, 6)).astype(np.float32) ** 3
  mask = np.asarray(cumulative(s, tau))
  share = s.astype(np.float64) / s.sum(-1, keepdims=True, dtype=np.float64)
  for taken, of in zip(mask, share):
    assert of[taken].sum() >= tau - 1e-6
    assert of[taken].sum() - of[taken].min() < tau + 1e-6
    assert taken.all() or of[taken].min() >= of[~taken].max()


def test_thresholds_as_xmoe_recorded_them():
  data = np.load(VECTORS / 'xmoe_threshold.npz')
  logits = data['logits']
  for t in (0.3, 0.5, 0.9):
    routing = threshold.route(jnp.asarray(logits)[None], t)
    combine = np.zeros(logits.shape, np.float32)
    rows = np.arange(len(logits))[:, None]
    np.add.at(combine, (rows, np.asarray(routing.choice_mk)), np.asarray(routing.gate_mk))
    np.testing.assert_allclose(combine, data[f't{t}_combine'], atol=1e-6)
    np.testing.assert_array_equal(np.asarray(routing.keep_mk).sum(1), data[f't{t}_count'])
    assert float(routing.load_balance_loss) == pytest.approx(float(data[f't{t}_aux']), rel=1e-5)
