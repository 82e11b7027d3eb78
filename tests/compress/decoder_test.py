"""Compression of decoders: the walk is the model, packed documents are samples, nodes run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import weights
from moejax.compress import driver, quantize, samples
from moejax.config import DecoderConfig, DecoderMoeConfig
from moejax.errors import UserError
from moejax.model import Model

pytestmark = pytest.mark.once
BASE = dict(
    vocab_size=97, d_model=32, d_head=8, d_ff=48, num_heads=4, num_kv_heads=2, num_layers=2,
    initializer_std=0.2,
)
MODELS = {
    'grin': DecoderConfig(
        family='grin', norm='layer', moe=DecoderMoeConfig(num_experts=4, jitter_eps=0.3), **BASE
    ),
    'qwen': DecoderConfig(
        family='qwen2_moe', moe=DecoderMoeConfig(
            num_experts=6, top_k=3, router='topk', d_ff=20, shared_d_ff=24, shared_gate=True,
            sparse_step=2,
        ), **BASE,
    ),
    'omega': DecoderConfig(
        family='mixtral', sliding_window=4,
        moe=DecoderMoeConfig(num_experts=4, top_k=1, router='sparsemixer_v1'), **BASE,
    ),
}


def batch(seed=0):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(3, 97, (6, 20))
  segments = np.ones((6, 20), np.int32)
  segments[:, 12:] = 2
  segments[0, 18:] = 0
  weights_bt = (segments > 0).astype(np.float32)
  weights_bt[:, 11] = 0
  return {
      'tokens': tokens, 'targets': np.roll(tokens, -1, 1), 'weights': weights_bt,
      'segments': segments,
      'positions': np.where(segments == 1, np.arange(20), np.arange(20) - 12),
  }


def whole_loss(model, made):
  logits = model.apply(
      jnp.asarray(made['tokens']), positions_bt=jnp.asarray(made['positions']),
      segments_bt=jnp.asarray(made['segments']), valid_bt=jnp.asarray(made['segments'] > 0),
  ).logits_btv
  picked = np.take_along_axis(
      np.asarray(jax.nn.log_softmax(logits)), made['targets'][..., None], -1
  )[..., 0]
  return -(picked * made['weights']).sum() / made['weights'].sum()


@pytest.mark.long(but=('omega',))
@pytest.mark.parametrize('name', MODELS)
def test_the_walk_is_the_model_and_compressed_experts_run(name):
  model = Model.init(MODELS[name], jax.random.key(0))
  if name == 'omega':
    model = dataclasses.replace(model, params=jax.tree.map(lambda a: a * 1.1, model.params))
  result = driver.compress(model, quantize.quantize(), [batch()], validation_batches=[batch(1)])
  report = result.report
  assert report['before']['loss'] == pytest.approx(whole_loss(model, batch(1)), rel=1e-5)
  assert report['after']['loss'] == pytest.approx(whole_loss(result.model, batch(1)), rel=1e-5)
  assert report['tokens'] == {'decoder': 118}
  layer = result.model.params['decoder']['layers_1']['ffn']['experts']
  assert {type(w) for w in layer.values()} == {weights.Ternary} and len(layer) == 3


def test_a_folder_round_trip_and_kinds_of_batches(tmp_path):
  model = Model.init(MODELS['grin'], jax.random.key(0))
  model.save(tmp_path / 'model')
  driver.compress(tmp_path / 'model', quantize.quantize(2), [batch()], tmp_path / 'out')
  loaded = Model.load(tmp_path / 'out')
  again = driver.compress(model, quantize.quantize(2), [batch()]).model
  tokens = jnp.asarray(batch()['tokens'])
  np.testing.assert_array_equal(loaded.apply(tokens).logits_btv, again.apply(tokens).logits_btv)
  bare = samples.collect(model.config, [{'tokens': batch()['tokens']}])
  assert len(bare.samples) == 6 and all(s.weights[-1] == 0 for s in bare.samples)
  assert len(samples.collect(model.config, [batch()]).samples) == 12


@pytest.mark.parametrize('change, message', [
    (dict(tokens=None), "lacks 'tokens'"),
    (dict(tokens=np.full((2, 3), 97)), r'span 97\.\.97, the model knows 0\.\.96'),
    (dict(tokens=np.ones((2, 3))), 'float64: token ids are integers'),
    (dict(tokens=np.ones(3, int)), r'shape \(3,\)'),
    (dict(targets=np.ones((6, 4), int)), r'targets has shape \(6, 4\)'),
    (dict(segments=np.zeros((6, 20), int)), 'no sample'),
])
def test_bad_batches_are_named(change, message):
  made = {k: v for k, v in {**batch(), **change}.items() if v is not None}
  if 'tokens' in change and change['tokens'] is not None:
    made = {'tokens': change['tokens']}
  with pytest.raises(UserError, match=message):
    samples.collect(MODELS['grin'], [made])
