"""Sizes and operations against hand counts, real nodes, and the published table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import account, model, presets, tree, weights
from moejax.config import ModelConfig, MoeConfig
from moejax.errors import UserError

CONFIG = ModelConfig(
    vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_heads=2, num_layers=2, num_decoder_layers=2,
    moe=MoeConfig(num_experts=4),
)


@pytest.fixture(scope='module')
def params():
  return model.abstract_params(CONFIG, jnp.bfloat16)


def ternary_node(shape, zero_share, seed=0):
  e, d, f = shape
  p = [zero_share, (1 - zero_share) / 2, (1 - zero_share) / 2]
  symbols = np.random.default_rng(seed).choice(3, size=(e, f, d), p=p)
  return weights.Ternary.from_symbols(symbols, np.tile([-1.0, 1.0], (e, f, 1)))


def test_parts_cover_the_model(params):
  parts = account.bytes_by_part(params)
  assert sum(parts.values()) == 2 * tree.count(params)
  assert parts['experts'] == 2 * (2 * 4 * 2 * 16 * 32)
  assert parts['router'] == 2 * (2 * 16 * 4)
  assert parts['embedding'] == 2 * 64 * 16
  assert parts['attention'] == 2 * 6 * 4 * 16 * 8
  assert parts['dense_ffn'] == 2 * (2 * 2 * 16 * 32)


def test_active_parameters_leave_out_unused_experts(params):
  unused = 2 * 3 * 2 * 16 * 32
  assert account.active_parameters(params, CONFIG) == tree.count(params) - unused


def test_flops_by_hand(params):
  source, target = 5, 3
  ffn = 2 * 2 * 16 * 32
  attention = 2 * 4 * 16 * 8
  router = 2 * 16 * 4
  encoder = source * (2 * (attention + ffn) + router) + 2 * 4 * 8 * source**2
  cross = target * attention / 2 + source * attention / 2
  decoder = target * (2 * (attention + ffn) + router) + 2 * cross
  decoder += 2 * 4 * 8 * (target**2 + target * source) + target * 2 * 64 * 16
  assert account.forward_flops(CONFIG, source, target, params) == encoder + decoder
  assert account.flops_per_token(CONFIG, source, target) == (encoder + decoder) / 8


def test_summary_and_layers_count_compressed_nodes(params):
  path = 'encoder/layers_1/ffn/experts/wi'
  node = ternary_node((4, 16, 32), 0.885)
  packed = tree.replace(params, path, node)
  before, after = account.summary(params, CONFIG), account.summary(packed, CONFIG)
  assert after['expert_bytes'] == before['expert_bytes'] - 2 * node.size + -(-node.bits() // 8)
  for same in ('parameters', 'active_parameters_per_token', 'flops_per_token'):
    assert after[same] == before[same]
  assert before['expert_bits_per_weight'] == 16
  rows = account.layers(packed, CONFIG)
  assert sum(r['parameters'] for r in rows) == after['parameters']
  assert sum(r['active_parameters'] for r in rows) == after['active_parameters_per_token']
  assert [r['path'] for r in rows if r['sparse']] == ['decoder/layers_1', 'encoder/layers_1']
  assert sum(r['stored_bytes'] for r in rows) == after['stored_bytes']
  row = next(r for r in rows if r['path'] == 'encoder/layers_1')
  assert row['expert_bits_per_weight'] == (16 * node.size + node.bits()) / (2 * node.size)
  assert account.summary(tree.abstract(packed), CONFIG) == after


@pytest.mark.parametrize('zero_share', [0.8, 0.885, 0.95])
@pytest.mark.parametrize('shape', [(2, 768, 1024), (2, 1024, 256)])
def test_prediction_is_within_one_percent_of_the_file(shape, zero_share):
  actual = ternary_node(shape, zero_share).bits()
  assert account.ternary_bits(shape, zero_share) == pytest.approx(actual, rel=0.01)


def test_prediction_of_the_other_format():
  rng = np.random.default_rng(3)
  symbols = rng.choice(3, size=(1, 256, 512), p=[0.885, 0.0575, 0.0575])
  node = weights.TernaryV1.from_symbols(symbols, np.tile([-1.0, 1.0], (1, 256, 1)))
  assert account.ternary_v1_bits((1, 512, 256), 0.885) == pytest.approx(node.bits(), rel=0.01)


def test_predicted_model():
  shapes = account.predicted(CONFIG, 0.885)
  paths = [p for p in tree.flatten(model.abstract_params(CONFIG)) if '/experts/' in p]
  assert account.predicted(CONFIG, dict.fromkeys(paths, 0.885)) == shapes
  other = 2 * (tree.count(model.abstract_params(CONFIG)) - 2 * 4 * 2 * 16 * 32)
  assert shapes['stored_bytes'] - shapes['expert_bytes'] == other
  with pytest.raises(UserError, match='zero share'):
    account.predicted(CONFIG, {})
  with pytest.raises(UserError, match='between 0 and 1'):
    account.predicted(CONFIG, 1.5)


def test_published_models_are_smaller_than_published():
  rows = {r['model']: r for r in account.published_sizes()}
  for row in rows.values():
    assert row['moejax_gb'] < row['moejax_as_published_gb'] < row['qmoe_published_gb']
  large = rows['switch-c-2048']
  assert large['bf16_gb'] == pytest.approx(3142, rel=0.001)
  assert large['moejax_as_published_gb'] < 141
  flat = account.shapes(presets.preset('switch-c-2048'), np.dtype(jnp.bfloat16))
  assert large['parameters'] == tree.count(flat) == sum(np.prod(a.shape) for a in flat.values())
  table = account.published_table().splitlines()
  assert len(table) == 5
  assert all(line.count('|') == table[0].count('|') for line in table)


def test_nothing_is_allocated_for_a_huge_model():
  sizes = account.predicted(presets.preset('switch-c-2048'), 0.886)
  assert 125e9 < sizes['stored_bytes'] < 140e9
  assert not jax.live_arrays() or sum(a.nbytes for a in jax.live_arrays()) < 1e9
