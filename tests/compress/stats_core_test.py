"""Sums over tokens against loops, against MC-SMoE's counts, and their contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.compress import stats_core
from moejax.errors import UserError


@pytest.fixture
def layer():
  """37 tokens, 5 experts of which the last is chosen by none, top-2, some padding."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(37, 5)).astype(np.float32)
  logits[:, 4] = -9
  choice = np.argsort(-logits, 1)[:, :2].astype(np.int32)
  gate = np.take_along_axis(np.exp(logits), choice, 1)
  x = rng.normal(size=(37, 3)).astype(np.float32)
  return logits, choice, gate, x, np.arange(37) % 5 != 0


def test_routing_is_counted_like_a_loop(layer):
  logits, choice, gate, _, mask = layer
  got = stats_core.routing_sums(logits, choice, gate, mask)
  tokens, gates = np.zeros(5), np.zeros(5)
  for i in np.flatnonzero(mask):
    for k in range(2):
      tokens[choice[i, k]] += 1
      gates[choice[i, k]] += gate[i, k]
  np.testing.assert_array_equal(got['tokens'], tokens)
  assert tokens[4] == 0 and tokens.sum() == 2 * mask.sum()
  np.testing.assert_allclose(got['gate'], gates, rtol=1e-5)
  np.testing.assert_allclose(got['gram'], logits[mask].T @ logits[mask], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(got['probability'].sum(), mask.sum(), rtol=1e-5)
  np.testing.assert_allclose(stats_core.usage(got), tokens / tokens.sum(), rtol=1e-6)


def test_padding_and_batches_change_nothing(layer):
  logits, choice, gate, x, mask = layer
  whole = stats_core.routing_sums(logits, choice, gate, mask)
  inputs = stats_core.input_sums(x, choice, mask, 5)
  noise = np.where(mask[:, None], 0, 100).astype(np.float32)
  totals = {}
  for cut in (slice(0, 10), slice(10, 37)):
    totals = stats_core.add(totals, stats_core.routing_sums(
        (logits + noise)[cut], choice[cut], gate[cut], mask[cut]
    ))
    totals = stats_core.add(
        totals, stats_core.input_sums((x + noise)[cut], choice[cut], mask[cut], 5)
    )
  for name, value in {**whole, **inputs}.items():
    np.testing.assert_allclose(totals[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    assert totals[name].dtype == np.float64


def test_inputs_and_outputs_by_expert(layer):
  _, choice, gate, x, mask = layer
  got = stats_core.input_sums(x, choice, mask, 5)
  pairs = [(i, k) for i in range(37) for k in range(2)]
  expert, token = choice.reshape(-1), np.array([i for i, _ in pairs])
  y = np.random.default_rng(1).normal(size=(74, 4)).astype(np.float32)
  out = stats_core.output_sums(y, expert, gate.reshape(-1), mask[token], 5)
  for e in range(5):
    own = (choice == e).any(1) & mask
    np.testing.assert_allclose(got['input'][e], x[own].sum(0), atol=1e-5)
    np.testing.assert_allclose(got['input_abs'][e], np.abs(x[own]).sum(0), atol=1e-5)
    np.testing.assert_allclose(got['input_square'][e], (x[own] ** 2).sum(0), rtol=1e-5, atol=1e-6)
    mine = (expert == e) & mask[token]
    norm = np.linalg.norm(y[mine], axis=1)
    np.testing.assert_allclose(out['norm'][e], norm.sum(), rtol=1e-5)
    np.testing.assert_allclose(out['square_norm'][e], (norm**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(
        out['gate_norm'][e], (norm * gate.reshape(-1)[mine]).sum(), rtol=1e-5
    )
    np.testing.assert_allclose(out['output'][e], y[mine].sum(0), atol=1e-5)
  np.testing.assert_allclose(got['square'], (x[mask] ** 2).sum(0), rtol=1e-5)
  mean = stats_core.mean({'tokens': np.array([2.0, 0.0]), 'output': np.ones((2, 3))}, 'output')
  np.testing.assert_array_equal(mean, [[0.5] * 3, [1.0] * 3])


def test_memory_is_that_of_the_sums():
  shapes = lambda m: jax.eval_shape(
      stats_core.routing_sums, jnp.zeros((m, 8)), jnp.zeros((m, 2), jnp.int32), jnp.zeros((m, 2)),
      jnp.ones(m, bool),
  )
  assert shapes(10) == shapes(100_000)
  assert sum(s.size for s in shapes(10).values()) == 8 * 8 + 3 * 8


def test_no_token_is_said():
  with pytest.raises(UserError, match='every position of the calibration is masked'):
    stats_core.usage({'tokens': np.zeros(4)})
