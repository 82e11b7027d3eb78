"""Evaluation by hand: losses, agreement, divergence, loads; then a tiny model as a user would."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config as config_lib
from moejax import evaluate
from moejax import model as model_lib
from moejax.errors import UserError
from moejax.evaluate import metrics
from moejax.nn.outputs import Output
from moejax.routing.types import Routing

CONFIG = config_lib.EncDecConfig(
    vocab_size=40, d_model=8, d_kv=4, d_ff=16, num_heads=2, num_layers=1, num_decoder_layers=1,
    dropout_rate=0.0, moe=config_lib.EncDecMoeConfig(
        num_experts=3, encoder_sparse_step=1, decoder_sparse_step=1
    ),
)
SENTINELS = 8


def hand_batch():
  # Targets: sentinel, word, word, EOS, padding.
  return {
      'targets': jnp.array([[39, 5, 6, 1, 0]]), 'weights': jnp.array([[1.0, 1, 1, 1, 0]]),
  }


def test_loss_sums_by_hand():
  logits = np.zeros((1, 5, 40), np.float32)
  logits[0, 1, 5] = math.log(40.0)  # p = 40 / (39 + 40)
  batch = hand_batch()
  content = metrics.content_mask(CONFIG, batch, CONFIG.vocab_size - SENTINELS)
  np.testing.assert_array_equal(content, [[0, 1, 1, 0, 0]])
  sums = {k: float(v) for k, v in metrics.loss_sums(jnp.asarray(logits), batch, content).items()}
  even, sharp = math.log(40), math.log(79 / 40)
  assert sums['loss'] == pytest.approx(3 * even + sharp, rel=1e-5)
  assert sums['content_loss'] == pytest.approx(even + sharp, rel=1e-5)
  assert sums['targets'] == 4 and sums['content_targets'] == 2


def test_agreement_by_hand():
  a = np.log(np.array([[[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]], np.float32))
  b = np.log(np.array([[[0.5, 0.25, 0.25], [0.6, 0.2, 0.2], [0.9, 0.05, 0.05]]], np.float32))
  content = jnp.array([[1.0, 1.0, 0.0]])
  sums = metrics.agreement_sums(jnp.asarray(a), jnp.asarray(b), content)
  assert float(sums['top1_agreement']) == 1.0
  first = 0.5 * math.log(0.5 / 0.7) + 0.25 * math.log(0.25 / 0.2) + 0.25 * math.log(2.5)
  second = 0.6 * math.log(6.0) + 0.2 * math.log(0.25) + 0.2 * math.log(2.0)
  assert float(sums['kl']) == pytest.approx(first + second, rel=1e-4)


def test_loads_count_real_tokens_only():
  routing = Routing(
      choice_mk=jnp.array([[0], [2], [2], [1]]),
      keep_mk=jnp.array([[True], [False], [True], [True]]),
      gate_mk=jnp.ones((4, 1)), logits_me=jnp.zeros((4, 3)), load_e=jnp.array([1, 1, 2]),
      load_balance_loss=jnp.float32(0), z_loss=jnp.float32(0),
  )
  output = Output(jnp.zeros(()), {'encoder/layers_0/ffn': routing})
  batch = {'encoder_tokens': jnp.array([[7, 8, 9, 0]]), 'weights': jnp.ones((1, 2))}
  loads = metrics.layer_loads(output, batch, 0)
  np.testing.assert_array_equal(loads['chosen/encoder/layers_0/ffn'], [1, 0, 2])
  np.testing.assert_array_equal(loads['kept/encoder/layers_0/ffn'], [1, 0, 1])


def test_routing_health_by_hand():
  health = metrics.routing_health(np.array([2.0, 2.0, 0.0, 4.0]), np.array([2.0, 2.0, 0.0, 2.0]))
  assert health['load'] == [0.25, 0.25, 0.0, 0.5]
  assert health['entropy'] == pytest.approx(1.5 * math.log(2))
  assert health['dropped'] == pytest.approx(0.25)
  assert (health['largest_share'], health['smallest_share']) == (0.5, 0.0)


def tiny_model(seed: int = 0) -> model_lib.Model:
  rng = np.random.default_rng(seed)
  shapes = model_lib.abstract_params(CONFIG)
  params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.5, jnp.float32), shapes)
  return model_lib.Model(CONFIG, params)


def tiny_batches():
  rng = np.random.default_rng(1)
  batches = []
  for _ in range(2):
    targets = rng.integers(2, 30, (3, 6)).astype(np.int32)
    targets[:, 0], targets[:, 4], targets[:, 5] = 39, 1, 0
    weights = np.ones((3, 6), np.float32)
    weights[:, 5] = 0
    decoder = np.concatenate([np.zeros((3, 1), np.int32), targets[:, :-1]], axis=1)
    encoder = rng.integers(2, 30, (3, 7)).astype(np.int32)
    batches.append({
        'encoder_tokens': encoder, 'decoder_tokens': decoder, 'targets': targets,
        'weights': weights,
    })
  return batches


def test_a_model_agrees_with_itself_and_losing_its_experts_changes_it():
  model, batches = tiny_model(), tiny_batches()
  result = evaluate.evaluate(
      model, batches, first_sentinel=CONFIG.vocab_size - SENTINELS, against=model, examples=2
  )
  assert result['agreement']['top1'] == 1.0
  assert result['agreement']['kl'] == pytest.approx(0.0, abs=1e-6)
  assert result['agreement']['reference_content_loss'] == pytest.approx(result['content_loss'])
  assert result['content_targets'] == 18 and result['targets'] == 30

  # The loss of the model's own logits, in NumPy.
  total = 0.0
  for batch in batches:
    logits = np.asarray(model_lib.forward(CONFIG, model.params, batch).logits_btv, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, batch['targets'][..., None], -1)[..., 0]
    total -= picked[:, 1:4].sum()
  assert result['content_loss'] == pytest.approx(total / 18, rel=1e-4)

  routing = result['routing']['encoder/layers_0/ffn']
  assert sum(routing['load']) == pytest.approx(1.0, abs=1e-4) and routing['dropped'] == 0.0
  example = result['examples'][1]
  assert len(example['targets']) == len(example['guesses']) == 5
  assert example['encoder'] == batches[0]['encoder_tokens'][1].tolist()

  cut = dataclasses.replace(model, params=evaluate.without_experts(model.params))
  zeroed = evaluate.evaluate(cut, batches, first_sentinel=CONFIG.vocab_size - SENTINELS)
  assert abs(zeroed['content_loss'] - result['content_loss']) > 1e-3
  experts = cut.params['encoder']['layers_0']['ffn']['experts']
  assert not np.any(np.asarray(experts['wo'])) and np.any(np.asarray(experts['wi']))


def test_models_with_other_vocabularies_are_not_compared():
  model = tiny_model()
  other = model_lib.Model(dataclasses.replace(CONFIG, vocab_size=48), {})
  with pytest.raises(UserError, match='vocab_size is 40 and 48'):
    evaluate.evaluate(model, tiny_batches(), against=other)


def test_no_text_is_an_error():
  with pytest.raises(UserError, match='nothing to evaluate on'):
    evaluate.evaluate(tiny_model(), [])
