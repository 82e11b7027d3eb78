"""SparseMixer worked by hand: scales, gates, gradients, variants, ablation, edge rows."""

import functools

import jax
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.routing import draws as draws_lib
from moejax.routing import sparsemixer

# softmax (4, 3, 1) / 8; every expert is a candidate.
LOGITS = np.log(np.array([[4.0, 3.0, 1.0]], np.float32))
P = np.array([4, 3, 1]) / 8
# v2*'s softmax has temperature 2: square roots, sum 2 + 1.7321 + 1.
P_STAR = np.sqrt([4, 3, 1]) / np.sqrt([4, 3, 1]).sum()


def forced(choice, uniform, experts=3):
  """Draws for one token and one choice: the others' noise is far below the wanted one's."""
  wanted = np.arange(experts) == choice
  return draws_lib.Draws(
      exponential=np.where(wanted, 1e-20, 1.0).astype(np.float32)[None, None],
      uniform=np.full((1, 1), uniform, np.float32),
  )


@functools.cache
def compiled(k=1, **options):
  """(logits, draws) -> Gates and the gradient of each token's gates, weighted 1, 10, 100 ..."""

  def fn(z, draws):
    made = sparsemixer.gates(z, k, draws=draws, **options)
    return (made.gate_mk * 10.0 ** np.arange(k)[None]).sum(), made

  return jax.jit(jax.grad(fn, has_aux=True))


def gates(logits, draws=None, **options):
  grad, made = jax.device_get(compiled(**options)(logits, draws))
  return made, grad


@pytest.mark.parametrize('version, below, above, node, weight, probs', [
    ('sparsemixer_v1', 0.499, 0.501, 0.5, 2.0, P),
    ('sparsemixer_v2', 0.749, 0.751, 0.3333, 1.0, P),
    ('sparsemixer_v2_star', 0.374, 0.376, 0.3333, 1.0, P_STAR),
    ('sampled_gating', 0.0, 0.5, 1.0, 1.0, P),
])
def test_scale_and_gradient_of_each_version(version, below, above, node, weight, probs):
  fn = functools.partial(gates, LOGITS, eps=None, version=version)
  for choice, uniform, scale in ((1, below, node), (1, above, 1.0), (2, below, node),
                                 (0, below, 1.0), (0, above, 1.0)):  # the best: always in full
    made, grad = fn(forced(choice, uniform))
    assert made.choice_mk[0, 0] == choice and made.scale_mk is None
    np.testing.assert_allclose(made.gate_mk, [[probs[choice] * scale]], rtol=1e-6)
    # The gradient ignores the scale.
    want = weight * probs[choice] * (np.eye(3)[choice] - probs)
    np.testing.assert_allclose(grad[0], want, atol=1e-6)
  made, _ = fn(forced(0, below), euler_on_argmax=False)
  np.testing.assert_allclose(made.gate_mk, [[probs[0] * node]], rtol=1e-6)


def test_paper_variant_returns_the_scale_beside_the_gate():
  made, grad = gates(LOGITS, forced(1, 0.0), eps=None, variant='paper')
  np.testing.assert_allclose(made.gate_mk, [[3 / 8]], rtol=1e-6)
  np.testing.assert_array_equal(made.scale_mk, np.float32([[1 / 3]]))
  np.testing.assert_allclose(grad[0], P[1] * (np.eye(3)[1] - P), atol=1e-6)
  made, _ = gates(LOGITS, forced(0, 0.0), eps=None, variant='paper')
  assert made.scale_mk[0, 0] == 1.0


def test_the_released_constant_is_not_a_third():
  made, _ = gates(LOGITS, forced(1, 0.0), eps=None, version='sparsemixer_v2')
  probs = made.stages[0].probs_me
  assert made.gate_mk[0, 0] == probs[0, 1] * np.float32(0.3333)


@pytest.mark.parametrize('version, slope, probs', [
    ('sparsemixer_v1', 1.0, P), ('sparsemixer_v2', 1.0, P), ('sparsemixer_v2_star', 0.5, P_STAR)
])
def test_evaluation_is_the_best_expert_with_its_plain_gradient(version, slope, probs):
  made, grad = gates(LOGITS, eps=None, version=version)
  assert made.choice_mk[0, 0] == 0 and made.scale_mk is None
  np.testing.assert_allclose(made.gate_mk, [[probs[0]]], rtol=1e-6)
  np.testing.assert_allclose(grad[0], slope * probs[0] * (np.eye(3)[0] - probs), atol=1e-6)


def test_two_gates_do_not_sum_to_one():
  # Stage 1 keeps experts 0, 1 (band 0.2) with p = 1 / (1 + e^-0.1); stage 2 keeps 1 alone, so the
  # gate there is 1 and has no gradient.
  made, grad = gates(np.array([[2.0, 1.9, 1.0]], np.float32), k=2, eps=0.05)
  p = 1 / (1 + np.exp(-0.1))
  np.testing.assert_allclose(made.gate_mk, [[p, 1.0]], rtol=1e-6)
  np.testing.assert_allclose(grad, [[p * (1 - p), -p * (1 - p), 0.0]], rtol=1e-5)


def test_masked_experts_get_no_gradient_and_stages_add_up():
  _, grad = gates(np.array([[2.0, 1.9, 1.85, -3.0]], np.float32), k=2, eps=0.1)
  first = np.exp([2.0, 1.9, 1.85, -np.inf])
  second = np.exp([-np.inf, 1.9, 1.85, -np.inf])
  p, q = first / first.sum(), second / second.sum()
  want = p[0] * (np.eye(4)[0] - p) + 10 * q[1] * (np.eye(4)[1] - q)
  np.testing.assert_allclose(grad[0], want, atol=1e-5)
  assert grad[0, 3] == 0


def test_v1_chooses_one():
  with pytest.raises(UserError, match='sparsemixer_v1 chooses one expert a token, not 2'):
    sparsemixer.gates(LOGITS, 2, version='sparsemixer_v1')


def test_v1_balances_the_probabilities_of_the_candidates():
  # Of (2, 1.9, 1.0) the band keeps two; both tokens go to expert 0: f = (1, 0, 0), P_0 = p: 3 p.
  logits = np.array([[[2.0, 1.9, 1.0]] * 2], np.float32)
  balance = lambda version: jax.jit(
      lambda z: sparsemixer.route(z, 1, version=version, eps=0.05).load_balance_loss
  )(logits)
  assert balance('sparsemixer_v1') == pytest.approx(3 / (1 + np.exp(-0.1)), rel=1e-6)
  full = np.exp(2.0) / np.exp([2.0, 1.9, 1.0]).sum()
  assert balance('sparsemixer_v2') == pytest.approx(3 * full, rel=1e-6)


def test_balance_counts_the_experts_drawn():
  # The draw takes expert 2, of probability 1/8: f = onehot(2), loss 3 / 8. The best would give 3/2.
  route = jax.jit(lambda z, draws: sparsemixer.route(z, 1, eps=None, draws=draws))
  got = route(LOGITS[None], forced(2, 0.0)).load_balance_loss
  assert got == pytest.approx(3 / 8, rel=1e-6)


def test_the_key_decides():
  logits = np.random.default_rng(0).standard_normal((2, 40, 6)).astype(np.float32)
  route = jax.jit(lambda key: sparsemixer.route(logits, 2, eps=0.5, key=key))
  once, again, other = (jax.device_get(route(jax.random.key(i))) for i in (1, 1, 2))
  jax.tree.map(np.testing.assert_array_equal, once, again)
  assert not np.array_equal(once.choice_mk, other.choice_mk)


def test_a_narrow_band_leaves_most_tokens_without_a_router_gradient():
  """Zero-mean Gaussian logits, 16 experts, eps 0.01: 0.952 and 0.891 (known shares, +-0.004)."""
  logits = np.random.default_rng(0).standard_normal((1, 50_000, 16)).astype(np.float32)
  draw = jax.jit(lambda z: sparsemixer.route(z, 2, key=jax.random.key(1)).candidates_mk)
  counts = np.asarray(draw(logits))
  assert (counts[:, 0] == 1).mean() == pytest.approx(0.952, abs=0.004)
  assert (counts == 1).all(-1).mean() == pytest.approx(0.891, abs=0.006)
  assert counts[:, 0].mean() == pytest.approx(1.05, abs=0.01)
