"""What stops a compression: an output that cannot be, a full disk, numbers that overflow."""

import dataclasses
import importlib.util
import json
from pathlib import Path
import resource

import jax.numpy as jnp
import numpy as np
import pytest

from moejax import report, store, tree, weights
from moejax.compress import driver, quantize
from moejax.errors import UserError
from moejax.model import Model

pytestmark = pytest.mark.once

_SPEC = importlib.util.spec_from_file_location(
    'driver_test', Path(__file__).with_name('driver_test.py')
)
common = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(common)


class Untouched:
  """Batches that nobody may ask for: what is wrong must be found before any work."""

  def __iter__(self):
    raise AssertionError('work began')


def foreign(tmp_path):
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'thesis.tex').write_text('years of work')
  return tmp_path / 'out'


def a_file(tmp_path):
  (tmp_path / 'out').write_text('x')
  return tmp_path / 'out'


@pytest.mark.parametrize('make, message', [
    (foreign, r"out holds 'thesis\.tex', which is no part of a model folder"),
    (a_file, 'out is a file: name a folder'),
    (lambda tmp_path: a_file(tmp_path) / 'below', 'a part of this path is a file'),
    (lambda tmp_path: Path('/sys/out'), 'not writable|read-only'),
    (lambda tmp_path: tmp_path / 'x' / '..' / 'model', 'is the model itself'),
])
def test_an_output_that_cannot_be_is_noticed_before_any_work(make, message, tmp_path):
  common.tiny().save(tmp_path / 'model')
  out = make(tmp_path)
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
  with pytest.raises(UserError, match=message) as error:
    driver.compress(tmp_path / 'model', quantize.quantize(2), Untouched(), out)
  assert '\n' not in str(error.value)
  assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')} == before


@pytest.mark.parametrize('room, where', [(1500, r'\.out\.compressing/step_0'), (11_000, 'out')])
def test_a_full_disk_leaves_only_whole_work_to_resume_from(room, where, tmp_path):
  """No file can grow past so many bytes: first a group does not fit, then the model."""
  common.tiny(experts=6).save(tmp_path / 'model')
  compress = lambda out: driver.compress(
      tmp_path / 'model', quantize.quantize(expert_group=1), common.batches(1), out
  )
  compress(tmp_path / 'whole')
  largest = max(p.stat().st_size for p in (tmp_path / 'whole').iterdir())
  assert largest > 11_000
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
  try:
    with pytest.raises(UserError, match=f'cannot write {tmp_path}/{where}.*: the file is') as error:
      compress(tmp_path / 'out')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'out').exists()
  assert not [p for p in tmp_path.rglob('*') if 'partial' in p.name]
  compress(tmp_path / 'out')
  assert common.files_of(tmp_path / 'out') == common.files_of(tmp_path / 'whole')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['model', 'out', 'whole']


def overflowing() -> Model:
  """Expert 0 of the encoder: finite weights, outputs too large for a Hessian in float32."""
  model = common.tiny()
  path = 'encoder/layers_1/ffn/experts/wi'
  wi = tree.get(model.params, path)
  return dataclasses.replace(
      model, params=tree.replace(model.params, path, wi.at[0].multiply(1e30))
  )


def test_a_hessian_that_overflows_is_rounded_and_reported_without_nan(tmp_path):
  overflowing().save(tmp_path / 'model')
  driver.compress(
      tmp_path / 'model', quantize.quantize(), common.batches(), tmp_path / 'out',
      validation_batches=common.batches(1, seed=5),
  )

  def refuse(name):
    raise AssertionError(f'{name} in JSON')

  values = json.loads((tmp_path / 'out' / 'report.json').read_text(), parse_constant=refuse)
  bad = [r for r in values['layers'] if r['relative_output_error'] is None]
  assert [(r['path'].rpartition('/')[2], r['expert']) for r in bad] == [('wi', 0), ('wo', 0)]
  assert bad[1]['fallback'] == 'hessian not positive definite: rounded'
  wo = store.Source(tmp_path / 'out').read('encoder/layers_1/ffn/experts/wo')
  assert isinstance(wo, weights.Ternary) and jnp.isfinite(wo.dense(jnp.float32)).all()
  merged = report.parse(values).headline.layers
  assert np.isfinite([row.relative_output_error for row in merged]).all()
  page = report.write(values, tmp_path / 'page').read_text()
  assert 'nan' not in page.lower().replace('finance', '')


def test_the_quality_gate_keeps_what_cannot_be_measured():
  result = driver.compress(overflowing(), quantize.quantize(max_error=0.9), common.batches())
  rows = {(r['path'], r['expert']): r for r in result.report['layers']}
  row = rows['encoder/layers_1/ffn/experts/wo', 0]
  assert row['bits'] == 'bfloat16'
  assert {tried['relative_output_error'] for tried in row['over_bound']} == {None}
  assert json.dumps(result.report, allow_nan=False)


def test_nan_weights_are_named(tmp_path):
  model = common.tiny()
  path = 'decoder/layers_1/ffn/experts/wi'
  wi = tree.get(model.params, path)
  broken = dataclasses.replace(
      model, params=tree.replace(model.params, path, wi.at[2, 3, 4].set(jnp.nan))
  )
  with pytest.raises(UserError, match=rf'{path}, expert 2: NaN or infinite weights; restore'):
    driver.compress(broken, quantize.quantize(), common.batches(1), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
