"""Bytes, parameters and operations against hand counts and real nodes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import account, model, store, tree, weights
from moejax.config import EncDecConfig, EncDecMoeConfig

CONFIG = EncDecConfig(
    vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_heads=2, num_layers=2, num_decoder_layers=2,
    moe=EncDecMoeConfig(num_experts=4),
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
  assert before['resident_bytes'] == before['stored_bytes']
  own = sum(a.nbytes for a in node.to_arrays().values())
  assert after['resident_bytes'] == before['resident_bytes'] - 2 * 4 * 16 * 32 + own
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
  assert all(r['nonzeros'] is None for r in rows if r['path'] != 'encoder/layers_1')


def test_rows_of_layers_and_of_parts_add_up_to_the_model():
  node = ternary_node((4, 16, 32), 0.8)
  params = model.init_params(CONFIG, jax.random.key(0))
  params = tree.replace(params, 'encoder/layers_1/ffn/experts/wi', node)
  params = tree.replace(params, 'decoder/final_norm', jnp.array([0.0, 1.0] * 8))
  layers, parts = account.layers(params, CONFIG), account.parts(params, CONFIG)
  whole = account.summary(params, CONFIG)
  assert {row['path']: row['stored_bytes'] for row in parts} == whole['bytes_by_part']
  for rows in (layers, parts):
    total = lambda name, rows=rows: sum(row[name] for row in rows)
    assert total('nonzeros') == account.nonzeros(params) < whole['parameters']
    assert total('resident_bytes') == whole['resident_bytes']
    assert total('parameters') == whole['parameters']
  assert next(r['nonzeros'] for r in layers if r['path'] == 'decoder') == (
      8 + CONFIG.relative_attention_num_buckets * CONFIG.num_heads)


def test_the_peak_grows_with_the_batch_and_holds_weights_and_logits(params):
  one, many = (account.peak_bytes(CONFIG, params, n, 32, 16) for n in (1, 8))
  least = account.resident_bytes(params) + 4 * (48 + 16 * 64)
  assert least < one < many
  assert many - one >= 7 * 4 * (48 + 16 * 64)


def test_a_folder_counts_as_its_params(tmp_path, params):
  filled = tree.map_paths(lambda _, leaf: np.zeros(leaf.shape, leaf.dtype), params)
  filled = tree.replace(filled, 'encoder/layers_1/ffn/experts/wi', ternary_node((4, 16, 32), 0.8))
  model.Model(CONFIG, filled).save(tmp_path / 'model')
  assert account.of_source(store.Source(tmp_path / 'model')) == account.summary(filled, CONFIG)
