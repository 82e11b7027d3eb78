"""The dry run: what `compress` then writes, within 1 %; from shapes alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax import account, compress, preset, quantize, store, tree
from moejax.compress import Search, predict
from moejax.config import EncDecConfig, EncDecMoeConfig
from moejax.errors import UserError
from moejax.model import Model, abstract_params

pytestmark = pytest.mark.once


def tiny():
  config = EncDecConfig(
      vocab_size=256, d_model=128, d_kv=8, d_ff=256, num_heads=2, num_layers=2,
      num_decoder_layers=2, relative_attention_num_buckets=8, moe=EncDecMoeConfig(num_experts=4),
  )
  rng = np.random.default_rng(0)
  fill = lambda path, leaf: (
      np.ones(leaf.shape, leaf.dtype) if path.endswith('norm')
      else (rng.standard_normal(leaf.shape) * 0.1).astype(leaf.dtype)
  )
  return Model(config, tree.map_paths(fill, abstract_params(config)))


def batches():
  rng = np.random.default_rng(0)
  tokens = rng.integers(2, 150, (24, 48)).astype(np.int32)
  targets = rng.integers(2, 150, (24, 32)).astype(np.int32)
  decoder = np.roll(targets, 1, 1)
  return [{
      'encoder_tokens': tokens, 'decoder_tokens': decoder, 'targets': targets,
      'weights': np.ones(targets.shape, np.float32),
  }]


def zero_shares(report):
  """The share of zeros of each weight, experts together."""
  zeros = {}
  for row in report['layers']:
    zeros.setdefault(row['path'], []).append(row['zeros'])
  return {path: float(np.mean(values)) for path, values in zeros.items()}


TRANSFORMS = {
    'ternary': quantize('ternary'), 'qmoe_v1': quantize('ternary', storage='qmoe_v1'),
    'two': quantize(2), 'three': quantize(3), 'four': quantize(4),
    'grouped': quantize(4, group_size=48), 'dense': quantize(2, storage='dense'),
    'chain': compress.chain(
        quantize(3, layers='encoder/.*', level_dtype='weights'), quantize(layers='decoder/.*')
    ),
}


@pytest.mark.long(but=('ternary', 'qmoe_v1', 'dense'))
@pytest.mark.parametrize('name', TRANSFORMS)
def test_it_predicts_what_compress_writes(name, tmp_path):
  model, transform = tiny(), TRANSFORMS[name]
  result = compress.compress(model, transform, batches(), tmp_path / 'out')
  report = result.report
  guess = compress.dry_run(
      model.config, transform, zero_share=zero_shares(report), dtype=jnp.float32
  )
  assert guess['before'] == report['before']
  for size in ('expert_bytes', 'stored_bytes'):
    assert guess['after'][size] == pytest.approx(report['after'][size], rel=0.01)
  exact = name not in ('ternary', 'qmoe_v1', 'chain')
  if exact:
    assert guess['after'] == report['after']
  made = store.Source(tmp_path / 'out')
  assert report['after'] == {**account.of_source(made), 'loss': None}
  changed = {row['path']: row['form'] for row in guess['layers']}
  assert changed == {path: predict.form(made.abstract(path)) for path in changed}
  assert set(changed) == {row['path'] for row in report['layers']}


def test_one_true_share_for_all_is_enough():
  model, transform = tiny(), quantize('ternary')
  report = compress.compress(model, transform, batches()).report
  share = float(np.mean([row['zeros'] for row in report['layers']]))
  guess = compress.dry_run(model, transform, zero_share=share)
  assert guess['after']['stored_bytes'] == pytest.approx(report['after']['stored_bytes'], rel=0.01)


def test_a_searched_grid_stays_within_its_budget_and_uses_it():
  model = tiny()
  transform = quantize(search=Search(target_bits=0.9), expert_group=4)
  after = compress.compress(model, transform, batches()).report['after']
  assert 0.87 < after['expert_bits_per_weight'] <= 0.9
  guess = compress.dry_run(model.config, transform)['after']['expert_bits_per_weight']
  assert guess == pytest.approx(0.9, rel=1e-3)


def test_no_weight_is_read(tmp_path, monkeypatch):
  tiny().save(tmp_path / 'model')

  def fail(*_, **__):
    raise AssertionError('a weight was read')

  for name in ('read', 'read_expert'):
    monkeypatch.setattr(store.Source, name, fail)
  guess = compress.dry_run(tmp_path / 'model', quantize(2))
  assert 2 < guess['after']['expert_bits_per_weight'] < 2.5
  huge = compress.dry_run(preset('switch-c-2048'), quantize('ternary'), zero_share=0.886)
  assert huge['after']['stored_bytes'] == pytest.approx(132.2e9, rel=1e-3)
  lines = predict.table(huge).splitlines()
  assert any(x.startswith('experts') and '3,140.695 GB' in x for x in lines)
  assert any(x.startswith('encoder wi') and 'Ternary' in x for x in lines)


def test_bad_use():
  config = tiny().config
  with pytest.raises(UserError, match='zero_share = 1.5'):
    compress.dry_run(config, quantize(), zero_share=1.5)
  with pytest.raises(UserError, match='no zero share given for encoder'):
    compress.dry_run(config, quantize(), zero_share={})
  with pytest.raises(UserError, match='no experts'):
    compress.dry_run(preset('t5-small'), quantize())
  with pytest.raises(UserError, match='takes no sparse layer'):
    compress.dry_run(config, quantize(layers='nowhere'))
  with pytest.raises(UserError, match='is a Ternary node'):
    compress.dry_run(config, compress.chain(quantize(), quantize(2)))
