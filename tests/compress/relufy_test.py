"""Activations with zeros: formulas, thresholds that reach a sparsity, and what comes after."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import flags
import moejax
from moejax import Model
from moejax import config as config_lib
from moejax.compress import as_dense, compress, moefy, profile
from moejax.config import Activation, CutsConfig
from moejax.errors import UserError
from moejax.ops import ffn

pytestmark = pytest.mark.once

_SPEC = importlib.util.spec_from_file_location(
    'small_models', Path(__file__).with_name('small_models.py')
)
small = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(small)
ROOT = Path(__file__).parents[2]


def test_formulas():
  z, u = np.array([-2.0, -0.3, 0.1, 0.4, 3.0]), np.array([1.0, -2.0, 4.0, -1.0, 0.1])
  units = lambda *args, **cuts: np.asarray(
      ffn.hidden_units(Activation(args[0], **cuts), *map(jnp.asarray, args[1:])), np.float64
  )
  silu = z / (1 + np.exp(-z))
  relu = np.maximum(z, 0)
  np.testing.assert_allclose(units('relu', z, shift=0.2), np.maximum(z - 0.2, 0), atol=1e-6)
  np.testing.assert_allclose(units('relu', z, cut=0.2), [0, 0, 0, 0.4, 3], atol=1e-6)
  np.testing.assert_allclose(units('drelu', u, z), relu * np.maximum(u, 0), atol=1e-6)
  kept = np.abs(silu) > 0.2
  np.testing.assert_allclose(units('silu', u, z, cut=0.2), silu * kept * u, atol=1e-6)
  hidden = silu * u
  np.testing.assert_allclose(
      units('silu', u, z, hidden_cut=0.25), hidden * (np.abs(hidden) > 0.25), atol=1e-6
  )
  np.testing.assert_array_equal(ffn.hidden_units('relu', jnp.asarray(z)), relu.astype(np.float32))


@pytest.mark.long(but=('teal-opt', 'fat-llama', 'cats-bert', 'teal-llama_biased'))
@pytest.mark.parametrize('family', list(small.DENSE))
@pytest.mark.parametrize('kind', ['teal', 'cats', 'fat'])
def test_thresholds_reach_the_sparsity_that_was_asked_for(family, kind):
  model, batches = small.model(family), small.batches(family, 4)
  made = moejax.relufy(model, kind, batches, sparsity=0.7)
  jax.tree.map(np.testing.assert_array_equal, made.params, model.params)
  cuts = getattr(made.config.cuts, 'hidden_cut' if kind == 'teal' else 'cut')
  assert min(cuts) > 0 and len(cuts) == 2 * len(made.config.stacks)
  # The first layer sees what it saw when it was measured.
  for stack in made.config.stacks:
    first = next(
        row for row in profile.profile(made, batches, look=profile.Look(expert_size=4))['layers']
        if row['path'] == f'{stack}/layers_0/ffn'
    )
    if stack == 'encoder' or len(made.config.stacks) == 1:
      assert first['active'] == pytest.approx(0.3, abs=0.01)


@pytest.mark.long(but=('llama_biased',))
@pytest.mark.parametrize('family', ['t5_gated', 'opt', 'llama_biased'])
def test_cuts_of_each_layer_hold_on_every_path(family):
  model, batches = small.model(family), small.batches(family, 2)
  made = moejax.relufy(model, 'teal', batches, sparsity=0.5)
  want = small.logits(made, family)
  assert np.abs(want - small.logits(model, family)).max() > 1e-3
  # Run by a walk, with all experts of split layers, and joined again.
  split = compress(
      made, moefy.moefy(expert_size=4, share=1.0, choice='cosine'), batches,
      validation_batches=batches[:1],
  )
  assert split.report['loss'] == pytest.approx(small.loss(made, family, batches[0]), rel=2e-5)
  np.testing.assert_allclose(small.logits(split.model, family), want, atol=2e-4)
  np.testing.assert_allclose(small.logits(as_dense(split.model), family), want, atol=2e-4)
  # And where layers that differ in nothing but cuts are stacked.
  stacked = moejax.nn.stacking.stack(made.params, made.config)
  again = small.logits(Model(made.config, stacked), family)
  np.testing.assert_allclose(again, want, atol=2e-5)


@pytest.mark.parametrize('kind', ['teal', 'cats', 'fat'])
@pytest.mark.parametrize('activation', ['silu', 'drelu'])
def test_thresholds_found_again_are_the_same(kind, activation):
  """What is cut already is not measured, and 'fat' and 'cats' leave dReLU its second branch."""
  model, batches = small.model('llama'), small.batches('llama', 2)
  model = Model(dataclasses.replace(model.config, activation=activation), model.params)
  once = moejax.relufy(model, kind, batches, sparsity=0.8)
  assert once.config.activation == ('relu' if (kind, activation) == ('fat', 'silu') else activation)
  for first in (once, moejax.relufy(model, 'teal', batches, sparsity=0.3)):
    twice = moejax.relufy(first, kind, batches, sparsity=0.8)
    field = 'hidden_cut' if kind == 'teal' else 'cut'
    assert getattr(twice.config.cuts, field) == getattr(once.config.cuts, field)
  if kind != 'teal' and activation == 'drelu':
    act = once.config.of_layer('decoder', 0).act
    small_up = ffn.hidden_units(act, jnp.full(3, act.cut / 2), jnp.full(3, 2 * act.cut))
    assert (np.asarray(small_up) > 0).all()


def test_a_head_keeps_its_activation(tmp_path):
  config = config_lib.EncoderConfig(
      vocab_size=61, d_model=16, d_head=8, d_ff=24, num_heads=2, num_kv_heads=2, num_layers=1
  )
  model = Model.init(config, jax.random.key(0))
  made = moejax.relufy(model, 'relu')
  assert made.config.activation == 'relu' and made.config.words_activation == 'gelu'
  assert made.config.cuts is None
  shifted = moejax.relufy(made, 'shifted', shift=0.5)
  assert shifted.config.words_activation == 'gelu' and shifted.config.cuts.shift == (0.5,)
  assert moejax.relufy(shifted, 'relu').config == made.config
  with pytest.raises(UserError, match='words_activation'):
    moejax.to_hf(made, tmp_path / 'hf')
  bare = Model.init(dataclasses.replace(config, head='none', pooler=True), jax.random.key(0))
  moejax.to_hf(moejax.relufy(bare, 'relu'), tmp_path / 'hf')
  assert moejax.from_hf(tmp_path / 'hf').config.activation == 'relu'


def test_relu_is_the_models_own_with_another_activation():
  model = small.model('llama')
  made = moejax.relufy(model, 'relu')
  want = Model(dataclasses.replace(model.config, activation='relu'), model.params)
  np.testing.assert_array_equal(small.logits(made, 'llama'), small.logits(want, 'llama'))
  assert moejax.relufy(model, 'drelu').config.activation == 'drelu'
  assert moejax.relufy(model, 'shifted', shift=0.25).config.cuts == CutsConfig(shift=(0.25,))


def test_a_folder_and_its_settings_survive(tmp_path):
  model, batches = small.model('llama'), small.batches('llama', 2)
  model.save(tmp_path / 'model')
  assert moejax.relufy(tmp_path / 'model', 'cats', batches, tmp_path / 'cut') is None
  read = Model.load(tmp_path / 'cut')
  in_memory = moejax.relufy(model, 'cats', batches)
  assert read.config == in_memory.config
  np.testing.assert_array_equal(small.logits(read, 'llama'), small.logits(in_memory, 'llama'))


def test_bad_requests(tmp_path):
  model, batches = small.model('opt'), small.batches('opt', 1)
  with pytest.raises(UserError, match="'drelu': both branches of a gated FFN"):
    moejax.relufy(model, 'drelu')
  with pytest.raises(UserError, match='tael.*teal'):
    moejax.relufy(model, 'tael', batches)
  with pytest.raises(UserError, match='sparsity = 1'):
    moejax.relufy(model, 'teal', batches, sparsity=1.0)
  with pytest.raises(UserError, match='shift = 1.0 is for'):
    moejax.relufy(model, 'relu', shift=1.0)
  with pytest.raises(UserError, match='calibration has no sample'):
    moejax.relufy(model, 'teal')
  with pytest.raises(UserError, match='has experts'):
    moejax.relufy(small.model('grin'), 'teal', small.batches('grin', 1))
  with pytest.raises(UserError, match='one for all, or one for each FFN'):
    dataclasses.replace(model.config, cuts=CutsConfig(cut=(0.1, 0.2, 0.3)))
  with pytest.raises(UserError, match='model.cuts.cut'):
    CutsConfig(cut=(-1.0,))
  cut = moejax.relufy(model, 'teal', batches)
  with pytest.raises(UserError, match='Hugging Face'):
    moejax.to_hf(cut, tmp_path / 'hf')
  with pytest.raises(UserError, match='Hugging Face'):
    moejax.to_hf(moejax.relufy(small.model('llama'), 'drelu'), tmp_path / 'hf')
  assert not (tmp_path / 'hf').exists()


def test_a_smooth_model_is_split_with_a_warning():
  model, batches = small.model('llama'), small.batches('llama', 2)
  step = moefy.moefy(expert_size=4, choice='cosine')
  with pytest.warns(UserWarning, match='100 % of the neurons are active.*relufy'):
    report = compress(model, step, batches).report
  assert len(report['warnings']) == 1
  filled = moefy.moefy(expert_size=4, choice='cosine', fill=True)
  for made in (
      compress(model, filled, batches), compress(small.model('opt'), step, small.batches('opt', 2))
  ):
    assert not any('are active' in said for said in made.report['warnings'])


@pytest.mark.parametrize('kind', ['relu', 'shifted', 'drelu', 'prosparse', 'hoyer', 'above'])
def test_the_training_config(kind, tmp_path):
  model = small.model('llama')
  model.save(tmp_path / 'model')
  experiment = flags.load_config(f'{ROOT}/configs/relufy.py:{kind}@{tmp_path / "model"}', [])
  assert experiment.init_from == str(tmp_path / 'model')
  wanted = {'drelu': 'drelu', 'above': 'silu'}.get(kind, 'relu')
  assert experiment.model.activation == wanted
  assert bool(experiment.activity.form) == (kind in ('prosparse', 'hoyer', 'above'))
  assert config_lib.from_json(config_lib.Experiment, json.loads(json.dumps(
      config_lib.to_json(experiment)))) == experiment
