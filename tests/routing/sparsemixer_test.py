"""SparseMixer worked by hand: scales, gates, gradients, variants, ablation, edge rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.routing import draws as draws_lib
from moejax.routing import sparsemixer

OPTIONS = ('version', 'eps', 'variant', 'euler_on_argmax')
gates = jax.jit(sparsemixer.gates, static_argnums=1, static_argnames=OPTIONS)
route = jax.jit(sparsemixer.route, static_argnums=1, static_argnames=OPTIONS)

# softmax (4, 3, 1) / 8; every expert is a candidate.
LOGITS = jnp.log(jnp.array([[4.0, 3.0, 1.0]]))
P = np.array([4, 3, 1]) / 8
# v2*'s softmax has temperature 2: square roots, sum 2 + 1.7321 + 1.
P_STAR = np.sqrt([4, 3, 1]) / np.sqrt([4, 3, 1]).sum()


def forced(choice, uniform, experts=3):
  """Draws for one token and one choice: the others' noise is far below the wanted one's."""
  wanted = jnp.arange(experts) == choice
  return draws_lib.Draws(
      exponential=jnp.where(wanted, 1e-20, 1.0)[None, None], uniform=jnp.full((1, 1), uniform)
  )


def gate(choice, uniform, logits=LOGITS, **options):
  made = gates(logits, 1, eps=None, draws=forced(choice, uniform), **options)
  return float(made.gate_mk[0, 0])


@pytest.mark.parametrize('version, below, above, node, probs', [
    ('sparsemixer_v1', 0.499, 0.501, 0.5, P),
    ('sparsemixer_v2', 0.749, 0.751, 0.3333, P),
    ('sparsemixer_v2_star', 0.374, 0.376, 0.3333, P_STAR),
    ('sampled_gating', 0.0, 0.5, 1.0, P),
])
def test_scale_of_each_version(version, below, above, node, probs):
  np.testing.assert_allclose(gate(1, below, version=version), probs[1] * node, rtol=1e-6)
  np.testing.assert_allclose(gate(1, above, version=version), probs[1], rtol=1e-6)
  # The best expert always takes the full step, unless told otherwise.
  np.testing.assert_allclose(gate(0, below, version=version), probs[0], rtol=1e-6)
  off = gate(0, below, version=version, euler_on_argmax=False)
  np.testing.assert_allclose(off, probs[0] * node, rtol=1e-6)


@pytest.mark.parametrize('version, weight, probs', [
    ('sparsemixer_v1', 2.0, P), ('sparsemixer_v2', 1.0, P), ('sparsemixer_v2_star', 1.0, P_STAR),
    ('sampled_gating', 1.0, P),
])
@pytest.mark.parametrize('uniform', [0.0, 0.9])
@pytest.mark.parametrize('variant', ['reference', 'paper'])
def test_the_gradient_ignores_the_scale(version, weight, probs, uniform, variant):
  grad = jax.grad(lambda z: gates(
      z, 1, eps=None, version=version, variant=variant, draws=forced(1, uniform)
  ).gate_mk.sum())(LOGITS)
  want = weight * probs[1] * (np.eye(3)[1] - probs)
  np.testing.assert_allclose(grad[0], want, atol=1e-6)


def test_paper_variant_returns_the_scale_beside_the_gate():
  options = dict(eps=None, variant='paper', draws=forced(1, 0.0))
  made = gates(LOGITS, 1, **options)
  np.testing.assert_allclose(made.gate_mk, [[3 / 8]], rtol=1e-6)
  np.testing.assert_array_equal(made.scale_mk, np.float32([[1 / 3]]))
  reference = gates(LOGITS, 1, eps=None, draws=forced(1, 0.0))
  assert reference.scale_mk is None
  # The released constant is float32(0.3333), not a third.
  assert float(reference.gate_mk[0, 0]) == np.float32(3 / 8) * np.float32(0.3333)


@pytest.mark.parametrize('version, probs', [
    ('sparsemixer_v1', P), ('sparsemixer_v2', P), ('sparsemixer_v2_star', P_STAR)
])
@pytest.mark.parametrize('variant', ['reference', 'paper'])
def test_evaluation_is_the_best_expert_with_its_plain_gradient(version, probs, variant):
  fn = lambda z: gates(z, 1, eps=None, version=version, variant=variant)
  made = fn(LOGITS)
  assert made.choice_mk[0, 0] == 0 and made.scale_mk is None
  np.testing.assert_allclose(made.gate_mk, [[probs[0]]], rtol=1e-6)
  grad = jax.grad(lambda z: fn(z).gate_mk.sum())(LOGITS)
  slope = 0.5 if version == 'sparsemixer_v2_star' else 1.0
  np.testing.assert_allclose(grad[0], slope * probs[0] * (np.eye(3)[0] - probs), atol=1e-6)


def test_two_gates_do_not_sum_to_one():
  # Stage 1 keeps experts 0, 1 (band 0.2) with p_0 = 1 / (1 + e^-0.1); stage 2 keeps 1 alone.
  made = gates(jnp.array([[2.0, 1.9, 1.0]]), 2, eps=0.05)
  np.testing.assert_allclose(made.gate_mk, [[1 / (1 + np.exp(-0.1)), 1.0]], rtol=1e-6)
  grad = jax.grad(lambda z: gates(z, 2, eps=0.05).gate_mk[0, 1])(
      jnp.array([[2.0, 1.9, 1.0]])
  )
  np.testing.assert_array_equal(grad, [[0.0, 0.0, 0.0]])


def test_masked_experts_get_no_gradient_and_stages_add_up():
  logits = jnp.array([[2.0, 1.9, 1.85, -3.0]])
  made = lambda z: gates(z, 2, eps=0.1)
  grad = jax.grad(lambda z: (made(z).gate_mk * jnp.array([[1.0, 10.0]])).sum())(logits)
  first = np.exp([2.0, 1.9, 1.85, -np.inf])
  second = np.exp([-np.inf, 1.9, 1.85, -np.inf])
  p, q = first / first.sum(), second / second.sum()
  want = p[0] * (np.eye(4)[0] - p) + 10 * q[1] * (np.eye(4)[1] - q)
  np.testing.assert_allclose(grad[0], want, atol=1e-5)


def test_v1_chooses_one():
  with pytest.raises(UserError, match='sparsemixer_v1 chooses one expert a token, not 2'):
    sparsemixer.gates(LOGITS, 2, version='sparsemixer_v1')


def test_v1_balances_the_probabilities_of_the_candidates():
  # Of (2, 1.9, 1.0) the band keeps two; both tokens go to expert 0: f = (1, 0, 0), P_0 = p: 3 p.
  logits = jnp.array([[[2.0, 1.9, 1.0]] * 2])
  routing = route(logits, 1, version='sparsemixer_v1', eps=0.05)
  p = 1 / (1 + np.exp(-0.1))
  assert routing.load_balance_loss == pytest.approx(3 * p, rel=1e-6)
  full = np.exp(2.0) / np.exp([2.0, 1.9, 1.0]).sum()
  routing = route(logits, 1, eps=0.05)
  assert routing.load_balance_loss == pytest.approx(3 * full, rel=1e-6)


def test_balance_counts_the_experts_drawn():
  # The draw takes expert 2, of probability 1/8: f = onehot(2), loss 3 / 8. The best would give 3/2.
  routing = route(LOGITS[None], 1, eps=None, draws=forced(2, 0.0))
  assert routing.load_balance_loss == pytest.approx(3 / 8, rel=1e-6)


def test_the_key_decides_and_draws_repeat_it():
  logits = jax.random.normal(jax.random.key(0), (2, 40, 6))
  fn = jax.jit(lambda **r: route(logits, 2, eps=0.5, **r))
  once, again, other = fn(key=jax.random.key(1)), fn(key=jax.random.key(1)), fn(
      key=jax.random.key(2))
  jax.tree.map(np.testing.assert_array_equal, once, again)
  assert not np.array_equal(once.choice_mk, other.choice_mk)
  recorded = fn(draws=draws_lib.from_key(jax.random.key(1), 2, 80, 6))
  jax.tree.map(np.testing.assert_array_equal, once, recorded)


def test_a_narrow_band_leaves_most_tokens_without_a_router_gradient():
  """Zero-mean Gaussian logits, 16 experts, eps 0.01: 0.952 and 0.891 (known shares, +-0.004)."""
  logits = jax.random.normal(jax.random.key(0), (1, 50_000, 16))
  draw = jax.jit(lambda z: route(z, 2, key=jax.random.key(1)).candidates_mk)
  counts = np.asarray(draw(logits))
  assert (counts[:, 0] == 1).mean() == pytest.approx(0.952, abs=0.004)
  assert (counts == 1).all(-1).mean() == pytest.approx(0.891, abs=0.006)
  assert counts[:, 0].mean() == pytest.approx(1.05, abs=0.01)
