"""The profile of a dense model: what is said of its layers, and the loss that is foreseen."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from moejax import Model
from moejax.compress import compress, profile
from moejax.compress.moefy import moefy
from moejax.errors import UserError
from moejax.report import profile_png

pytestmark = pytest.mark.once

_SPEC = importlib.util.spec_from_file_location(
    'small_models', Path(__file__).with_name('small_models.py')
)
small = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(small)


def test_a_relu_model():
  model, batches = small.model('opt'), small.batches('opt', 4)
  look = profile.Look(expert_size=4, shares=(0.5, 1.0))
  found = profile.profile(model, batches, batches[:1], look)
  assert [row['path'] for row in found['layers']] == [
      'decoder/layers_0/ffn', 'decoder/layers_1/ffn']
  assert found['experts'] == 6 and not found['smooth']
  first = found['layers'][0]
  assert first['tokens'] == 4 * 4 * 24
  assert 0.2 < first['active'] < 0.8 and 0 < first['hoyer'] <= first['active'] + 1e-6
  assert first['rates'] == sorted(first['rates'])
  assert first['mass'] == sorted(first['mass'])
  assert first['mass'][-1] == pytest.approx(1.0, abs=1e-5)
  assert found['loss'] == pytest.approx(small.loss(model, 'opt', batches[0]), rel=1e-5)
  assert found['expected']['1'] == pytest.approx(found['loss'], rel=1e-5)
  made = compress(
      model, moefy(expert_size=4, share=0.5, choice='oracle'), batches,
      validation_batches=batches[:1],
  )
  assert found['expected']['0.5'] == pytest.approx(made.report['loss'], rel=1e-5)
  assert 'decoder/layers_1/ffn' in profile.table(found)
  assert profile_png.render(found)[:4] == b'\x89PNG'


def test_a_smooth_model_is_told_to_be(tmp_path):
  model, batches = small.model('llama'), small.batches('llama', 1)
  model.save(tmp_path / 'model')
  found = profile.profile(tmp_path / 'model', batches, look=profile.Look(expert_size=8))
  assert found['smooth'] and found['expected'] == {} and found['loss'] is None
  assert 'relufy' in profile.table(found)
  assert min(row['active'] for row in found['layers']) > 0.99
  above = profile.profile(model, batches, look=profile.Look(expert_size=8, threshold=1e9))
  assert max(row['active'] for row in above['layers']) == 0


def test_bad_requests():
  model, batches = small.model('t5'), small.batches('t5', 1)
  with pytest.raises(UserError, match='expert_size = 7 does not divide d_ff = 24'):
    profile.profile(model, batches, look=profile.Look(expert_size=7))
  with pytest.raises(UserError, match=r'shares = \(0.0,\)'):
    profile.Look(shares=(0.0,))
  split = compress(model, moefy(4, choice='cosine'), batches).model
  assert isinstance(split, Model)
  with pytest.raises(UserError, match='has experts already'):
    profile.profile(split, batches)
  assert np.isfinite(small.logits(split, 't5')).all()
