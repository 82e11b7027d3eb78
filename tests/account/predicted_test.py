"""Sizes foreseen against nodes made from symbols; 1 % for codes, exact for the rest."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax import account, weights


def symbols_of(shape, zero_share, seed=0):
  e, d, f = shape
  p = [zero_share, (1 - zero_share) / 2, (1 - zero_share) / 2]
  return np.random.default_rng(seed).choice(3, size=(e, f, d), p=p)


@pytest.mark.parametrize('zero_share', [0.8, 0.885, 0.95])
@pytest.mark.parametrize('shape', [(2, 768, 1024), (2, 1024, 256)])
def test_ternary_within_one_percent(shape, zero_share):
  e, _, f = shape
  symbols = symbols_of(shape, zero_share)
  node = weights.Ternary.from_symbols(symbols, np.tile([-1.0, 1.0], (e, f, 1)))
  guess = account.ternary_node(shape, zero_share)
  assert guess.shape == node.shape and guess.offsets.shape == node.offsets.shape
  assert guess.bits() == pytest.approx(node.bits(), rel=0.01)


@pytest.mark.parametrize('storage', ['moejax', 'qmoe_v1'])
@pytest.mark.parametrize('share', [0.8, 0.885, 0.953])
def test_one_rate_for_nodes_and_arrays_of_shares(storage, share):
  symbols = symbols_of((2, 512, 96), share, seed=1)
  kind = weights.Ternary if storage == 'moejax' else weights.TernaryV1
  stored = kind.from_symbols(symbols, np.ones((2, 96, 2)) * [-1, 1]).bits_per_weight()
  own = float((symbols == 0).mean())
  rates = account.ternary_bits_per_weight([own, 0.5], rows=96, cols=512, storage=storage)
  assert rates[0] == pytest.approx(stored, rel=0.01) and rates[1] > rates[0]
  node = account.ternary_node((2, 512, 96), own, storage=storage)
  assert isinstance(node, kind) and abs(node.bits() - rates[0] * node.size) <= 8  # whole words


def test_a_searched_grid_takes_its_target():
  for share in (0.7, 0.95):
    held = account.ternary_node((2, 512, 96), share, target_bits=0.9)
    assert 0.9 >= held.bits_per_weight() > 0.8995


@pytest.mark.parametrize('bits,group', [(2, None), (3, None), (4, None), (4, 100)])
def test_packed_is_exact(bits, group):
  symbols = np.random.default_rng(0).integers(0, 1 << bits, (2, 24, 330))
  groups = 4 if group else 1
  levels = np.ones((2, 24, groups))
  node = weights.Packed.from_symbols(
      symbols, levels, levels, bits=bits, group_size=group or 0, level_dtype=jnp.float32
  )
  guess = account.packed_node((2, 330, 24), bits, group_size=group, level_dtype=jnp.float32)
  assert guess.shape == node.shape and guess.bits() == node.bits()


@pytest.mark.parametrize('name, widths', [
    ('switch-base-128', (768, 3072)), ('switch-large-128', (1024, 4096)),
    ('switch-c-2048', (2080, 6144)),
])
def test_the_zero_share_of_published_models_follows_from_their_widths(name, widths):
  found = np.mean([account.expected_zero_share(cols) for cols in widths])
  assert found == pytest.approx(account.QMOE_PUBLISHED[name][0], abs=0.0065)


def test_rounding_gaussian_outputs_leaves_the_expected_zeros():
  for cols, threshold in ((64, 0.5), (512, 0.5), (512, 0.65)):
    w = np.random.default_rng(0).normal(size=(2000, cols))
    high, low = w.max(1, keepdims=True), w.min(1, keepdims=True)
    zeros = ((w <= threshold * high) & (w >= threshold * low)).mean()
    guess = account.expected_zero_share(cols, rounding=True, threshold=threshold)
    assert guess == pytest.approx(zeros, abs=0.003)
  assert account.expected_zero_share(64) < account.expected_zero_share(64, rounding=True)
