"""The driver: kill and resume, bounded memory, the quality gate, storage, reports, bad input."""

import dataclasses
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import tree, weights
from moejax.compress import base, driver, matrix, parts, quantize
from moejax.config import EncDecConfig, EncDecMoeConfig
from moejax.errors import UserError
from moejax.model import Model

pytestmark = pytest.mark.once
ROOT = Path(__file__).parents[2]


def tiny(layers=2, experts=4, d=16, ff=32, gated=False):
  config = EncDecConfig(
      vocab_size=256, d_model=d, d_kv=8, d_ff=ff, num_heads=2, num_layers=layers,
      num_decoder_layers=2, relative_attention_num_buckets=8, gated=gated,
      activation='gelu_new' if gated else 'relu', moe=EncDecMoeConfig(num_experts=experts),
  )
  return Model.init(config, jax.random.key(0))


def batches(count=2, rows=6, length=20, seed=0):
  rng = np.random.default_rng(seed)
  out = []
  for _ in range(count):
    tokens = rng.integers(2, 150, (rows, length)).astype(np.int32)
    tokens[0, 12:] = 0
    decoder = rng.integers(2, 150, (rows, 9)).astype(np.int32)
    decoder[:, 0] = 0
    out.append({
        'encoder_tokens': tokens, 'decoder_tokens': decoder,
        'targets': np.roll(decoder, -1, 1), 'weights': np.ones((rows, 9), np.float32),
    })
  return out


def files_of(folder):
  return {
      f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name != 'report.json'
  }


def test_folder_round_trip_and_report(tmp_path):
  model = tiny()
  model.save(tmp_path / 'model')
  transform = quantize.quantize(expert_group=3)
  result = driver.compress(
      tmp_path / 'model', transform, batches(), tmp_path / 'small',
      validation_batches=batches(1, seed=5),
  )
  assert result.model is None and not (tmp_path / '.small.compressing').exists()
  loaded = Model.load(tmp_path / 'small')
  node = loaded.params['encoder']['layers_1']['ffn']['experts']['wi']
  assert isinstance(node, weights.Ternary) and node.shape == (4, 16, 32)
  memory = driver.compress(model, transform, batches(), validation_batches=batches(1, seed=5))
  for path in (('encoder', 'wi'), ('decoder', 'wo')):
    pick = lambda m, p=path: m.params[p[0]]['layers_1']['ffn']['experts'][p[1]]
    np.testing.assert_array_equal(
        pick(loaded).dense(jnp.float32), pick(memory.model).dense(jnp.float32)
    )
  report = json.loads((tmp_path / 'small' / 'report.json').read_text())
  assert report['loss'] == report['after']['loss'] == memory.report['loss']
  assert report['before']['loss'] == memory.report['before']['loss'] != report['loss']
  untouched = driver.compress(
      model, quantize.quantize(4, method='rtn', max_error=0.0), batches(1), None,
      validation_batches=batches(1, seed=5),
  ).report
  assert untouched['before']['loss'] == pytest.approx(untouched['after']['loss'], abs=1e-3)
  assert len(report['layers']) == 2 * 2 * 4
  for row in report['layers']:
    assert row['relative_output_error'] <= row['error_before_refit']
    assert 0 < row['zeros'] < 1 and row['bits'] == 'ternary'
    assert bool(row['fallback']) == (row['tokens'] == 0)
  assert report['after']['expert_bytes'] == sum(
      leaf.bits() for stack in ('encoder', 'decoder')
      for leaf in loaded.params[stack]['layers_1']['ffn']['experts'].values()
  ) // 8
  assert report['before']['expert_bits_per_weight'] == 32
  batch = batches(1)[0]
  out = loaded.apply(jnp.asarray(batch['encoder_tokens']), jnp.asarray(batch['decoder_tokens']))
  assert jnp.isfinite(out.logits_btv).all()


def test_walk_equals_the_model():
  """The buffer's final states are the compressed model's own forward pass, padding and all."""
  result = driver.compress(tiny(), quantize.quantize(2), batches(1))
  batch = batches(1)[0]
  tokens = jnp.asarray(batch['encoder_tokens'])
  out = result.model.apply(tokens, jnp.asarray(batch['decoder_tokens']), encoder_mask=tokens != 0)
  want = np.asarray(out.encoder_bsd)[np.asarray(tokens) != 0]
  np.testing.assert_allclose(result.states['encoder'], want, atol=2e-5)


_KILLED = '''
import sys
sys.path[:0] = [{root!r}, {here!r}]
from pathlib import Path
import driver_test
from moejax.compress import driver, quantize
driver.compress(Path({model!r}), quantize.quantize(expert_group=1), driver_test.batches(),
                Path({out!r}), validation_batches=driver_test.batches(1, seed=5))
'''


def test_kill_and_resume_gives_identical_files(tmp_path):
  tiny(experts=6).save(tmp_path / 'model')
  out = tmp_path / 'out'
  code = _KILLED.format(root=str(ROOT), here=str(Path(__file__).parent),
                        model=str(tmp_path / 'model'), out=str(out))
  env = {**os.environ, 'PYTHONPATH': str(ROOT)}
  process = subprocess.Popen([sys.executable, '-c', code], env=env)
  work = tmp_path / '.out.compressing' / 'step_0'
  deadline = time.monotonic() + 600
  while process.poll() is None and len(list(work.glob('*.0000?'))) < 4:
    assert time.monotonic() < deadline
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not out.exists()
  survivors = {f: f.stat().st_mtime_ns for f in work.glob('*/group.json')}
  assert len(survivors) >= 4
  call = lambda folder: driver.compress(
      tmp_path / 'model', quantize.quantize(expert_group=1), batches(), folder,
      validation_batches=batches(1, seed=5),
  )
  call(out)
  call(tmp_path / 'whole')
  assert files_of(out) == files_of(tmp_path / 'whole')
  again, whole = (
      json.loads((f / 'report.json').read_text()) for f in (out, tmp_path / 'whole')
  )
  assert again['layers'] == whole['layers'] and again['loss'] == whole['loss']


def test_another_job_does_not_resume(tmp_path):
  tiny().save(tmp_path / 'model')
  work = tmp_path / '.out.compressing'
  (work / 'step_0' / 'encoder.layers_1.ffn.00000').mkdir(parents=True)
  (work / 'job.json').write_text('{"job": "something else"}')
  result = driver.compress(tmp_path / 'model', quantize.quantize(2), batches(1), tmp_path / 'out')
  assert len(result.report['layers']) == 16


def test_quality_gate_climbs(tmp_path):
  model = tiny()
  loose = driver.compress(model, quantize.quantize(), batches())
  errors = [row['relative_output_error'] for row in loose.report['layers']]
  bound = float(np.quantile(errors, 0.3))
  gated = driver.compress(model, quantize.quantize(max_error=bound), batches())
  rows = gated.report['layers']
  assert len({row['bits'] for row in rows}) > 1
  for row in rows:
    assert row['bits'] == 'bfloat16' or row['relative_output_error'] <= bound
    assert all(t['relative_output_error'] > bound for t in row['over_bound'])
  gated.model.save(tmp_path / 'gated')
  again = Model.load(tmp_path / 'gated')
  for stack in ('encoder', 'decoder'):
    for name in ('wi', 'wo'):
      pick = lambda m, s=stack, n=name: parts.dense(m.params[s]['layers_1']['ffn']['experts'][n])
      np.testing.assert_array_equal(pick(again), pick(gated.model))


def test_nothing_passes_keeps_bfloat16():
  model = tiny()
  result = driver.compress(model, quantize.quantize(max_error=0.0), batches(1))
  kept = [row for row in result.report['layers'] if row['bits'] == 'bfloat16']
  assert kept and all(len(row['over_bound']) == 4 for row in kept)
  wi = result.model.params['encoder']['layers_1']['ffn']['experts']['wi']
  row = next(r for r in kept if r['path'] == 'encoder/layers_1/ffn/experts/wi')
  original = model.params['encoder']['layers_1']['ffn']['experts']['wi'][row['expert']]
  np.testing.assert_array_equal(
      parts.dense(wi)[row['expert']], original.astype(jnp.bfloat16).astype(jnp.float32)
  )


@pytest.mark.long(but=('8-moejax-gptq-None', '4-moejax-gptq-8', 'ternary-dense-gptq-8'))
@pytest.mark.parametrize('transform', [
    quantize.qmoe(), quantize.quantize(2), quantize.quantize(3, act_order=True),
    quantize.quantize(8),
    quantize.quantize(4, group_size=8), quantize.quantize(2, storage='dense'),
    quantize.quantize(storage='dense', group_size=8, act_order=True),
    quantize.quantize(method='rtn', refit=False), quantize.quantize(3, symmetric=True),
    quantize.quantize(grid_scale=0.8, threshold=0.6, true_sequential=True),
], ids=lambda t: f'{t.matrix.bits}-{t.matrix.storage}-{t.matrix.method}-{t.matrix.group_size}')
def test_settings_run_on_a_gated_model(transform):
  result = driver.compress(tiny(gated=True), transform, batches(1))
  experts = result.model.params['decoder']['layers_1']['ffn']['experts']
  assert set(experts) == {'gate', 'wi', 'wo'}
  errors = [row['relative_output_error'] for row in result.report['layers']]
  assert np.isfinite(errors).all() and max(errors) < 1.5
  batch = batches(1)[0]
  out = result.model.apply(
      jnp.asarray(batch['encoder_tokens']), jnp.asarray(batch['decoder_tokens'])
  )
  assert jnp.isfinite(out.logits_btv).all()


def test_refit_lowers_the_error_of_the_layers():
  plain = driver.compress(tiny(), quantize.quantize(refit=False), batches())
  refit = driver.compress(tiny(), quantize.quantize(), batches())
  mean = lambda r: np.mean([row['relative_output_error'] for row in r.report['layers']])
  assert mean(refit) < 0.95 * mean(plain)


def test_chain_takes_a_pass_each():
  steps = base.chain(
      quantize.quantize(2, layers='encoder/.*'), quantize.quantize(layers='decoder/.*')
  )
  result = driver.compress(tiny(), steps, batches(1))
  pick = lambda s: result.model.params[s]['layers_1']['ffn']['experts']['wi']
  assert isinstance(pick('encoder'), weights.Packed)
  assert isinstance(pick('decoder'), weights.Ternary)
  assert [s['transform'] for s in result.report['steps']] == ['quantize', 'quantize']


@pytest.mark.parametrize('make,message', [
    (lambda: quantize.quantize(5), 'bits = 5'),
    (lambda: quantize.quantize(method='gtpq'), "did you mean 'gptq'"),
    (lambda: quantize.quantize(group_size=16), 'group_size = 16 with ternary'),
    (lambda: quantize.quantize(2, group_size=16, act_order=True), 'act_order'),
    (lambda: quantize.quantize(2, storage='qmoe_v1'), 'ternary weights only'),
    (lambda: quantize.quantize(layers='('), 'no regular expression'),
    (lambda: quantize.quantize(threshold=1.5), 'threshold = 1.5'),
    (lambda: quantize.quantize(damping=float('inf')), 'damping = inf'),
    (lambda: quantize.quantize(max_error=-1.0), 'max_error = -1'),
    (lambda: matrix.Search(target_bits=-1.0), 'target_bits = -1'),
    (lambda: matrix.Search(scales=()), r'scales = \(\)'),
    (lambda: base.chain(), 'at least one'),
])
def test_bad_settings(make, message):
  with pytest.raises(UserError, match=message):
    make()


def test_bad_calls(tmp_path):
  transform = quantize.quantize()
  with pytest.raises(UserError, match='no sample'):
    driver.compress(tiny(), transform, [])
  with pytest.raises(UserError, match='tokenizer of the model'):
    bad = {**batches(1)[0], 'encoder_tokens': np.full((6, 20), 999)}
    driver.compress(tiny(), transform, [bad])
  with pytest.raises(UserError, match="lacks 'targets'"):
    driver.compress(tiny(), transform, [{'encoder_tokens': 0, 'decoder_tokens': 0, 'weights': 0}])
  with pytest.raises(UserError, match='takes no sparse layer'):
    driver.compress(tiny(), quantize.quantize(layers='nowhere'), batches(1))
  once = driver.compress(tiny(), transform, batches(1))
  with pytest.raises(UserError, match='Ternary node'):
    driver.compress(once.model, transform, batches(1))
  with pytest.raises(UserError, match='does not exist'):
    driver.compress(tmp_path / 'none', transform, batches(1))


@pytest.mark.long(but=('ternary',))
@pytest.mark.parametrize('bits', ['ternary', 2])
def test_the_published_recipe_takes_half_precision(bits, tmp_path):
  model = tiny()
  half = dataclasses.replace(model, params=tree.cast_floats(model.params, jnp.float16))
  driver.compress(half, quantize.qmoe(bits), batches(1), tmp_path / 'out')
  loaded = Model.load(tmp_path / 'out')
  node = loaded.params['encoder']['layers_1']['ffn']['experts']['wi']
  assert {leaf.dtype for leaf in jax.tree.leaves(node)} >= {np.dtype(np.float16)}
  tokens = jnp.asarray(batches(1)[0]['decoder_tokens'])
  assert jnp.isfinite(loaded.apply(tokens, tokens).logits_btv).all()


def test_a_budget_that_cannot_be_kept_is_reported():
  search = matrix.Search(target_bits=0.3)
  report = driver.compress(tiny(), quantize.quantize(search=search), batches(1)).report
  assert report['over_budget'] == ['decoder/layers_1/ffn', 'encoder/layers_1/ffn']
  assert report['after']['expert_bits_per_weight'] > 0.3
  kept = driver.compress(
      tiny(), quantize.quantize(search=matrix.Search(target_bits=9.0)), batches(1)
  ).report
  assert kept['over_budget'] == []


def test_a_mistake_in_the_layers_leaves_no_work_folder(tmp_path):
  with pytest.raises(UserError, match='check its setting'):
    driver.compress(tiny(), quantize.quantize(layers='nosuch'), batches(1), tmp_path / 'out')
  assert list(tmp_path.iterdir()) == []
