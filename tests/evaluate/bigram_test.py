"""The Kneser-Ney bigram against a corpus small enough to count by hand."""

import math

import numpy as np
import pytest

from moejax import config as config_lib
from moejax.data import batches as batches_lib
from moejax.data import packing
from moejax.errors import UserError
from moejax.evaluate import bigram as bigram_lib
from moejax.evaluate import samples

# Two documents over the words 3, 4, 5: 'abab' and 'ac'. Pairs: ab 2, ba 1, ac 1.
A, B, C = 3, 4, 5
CORPUS = batches_lib.Corpus(
    tokens=np.array([A, B, A, B, A, C], np.int32), starts=np.array([0, 4, 6])
)


def trained() -> bigram_lib.Bigram:
  return bigram_lib.Bigram.train(CORPUS, 6, words=6)


def test_counts_stay_inside_documents():
  model = trained()
  assert model.keys.tolist() == [A * 6 + B, A * 6 + C, B * 6 + A]
  assert model.counts.tolist() == [2, 1, 1]


def test_discounts_by_hand():
  # Two pairs occur once and one twice: n1 / (n1 + 2 n2) = 2 / 4.
  assert trained().discount == 0.5
  assert bigram_lib.discount(np.array([3, 4])) == 0.75


def test_probabilities_by_hand():
  # a, b and c each follow one word: one of three pairs. Three ones and no twos: discount 0.75, so
  # P(w) = (1 - 0.75) / 3 + 0.75 * 3 / 3 / 6 = 1/12 + 1/8 for those and 1/8 for the others.
  model = trained()
  seen, unseen = 1 / 12 + 1 / 8, 1 / 8
  np.testing.assert_allclose(model.unigram[[A, B, C]], seen, rtol=1e-12)
  np.testing.assert_allclose(model.unigram[[0, 1, 2]], unseen, rtol=1e-12)
  # After a: 3 pairs, 2 successors; (2 - 0.5) / 3 + 0.5 * 2 / 3 * P(b).
  found = model.probability(np.array([A, A, A, B]), np.array([B, C, A, A]))
  expected = [1.5 / 3 + seen / 3, 0.5 / 3 + seen / 3, seen / 3, 0.5 / 1 + 0.5 * seen]
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_unknown_context_backs_off():
  model = trained()
  found = model.probability(np.array([C, -1]), np.array([B, B]))
  np.testing.assert_allclose(found, model.unigram[B], rtol=1e-12)


def test_probabilities_sum_to_one():
  model = trained()
  for v in (-1, 0, A, B, C):
    total = model.probability(np.full(6, v), np.arange(6)).sum()
    assert total == pytest.approx(1.0, abs=1e-12)


def test_content_loss_by_hand():
  config = config_lib.EncDecConfig(
      vocab_size=8, d_model=4, d_kv=4, d_ff=4, num_heads=1, num_layers=1, num_decoder_layers=1,
      family='t5',
  )
  # Text a b a c with 'b a' hidden by sentinel 7: encoder a 7 c EOS, targets 7 b a EOS.
  batch = {
      'encoder_tokens': np.array([[A, 7, C, 1]]), 'targets': np.array([[7, B, A, 1]]),
      'decoder_tokens': np.array([[0, 7, B, A]]), 'weights': np.ones((1, 4), np.float32),
  }
  model = bigram_lib.Bigram.train(CORPUS, 8, words=6)
  words = samples.previous_tokens(batch, config, first_sentinel=6)
  assert words.tokens.tolist() == [B, A]
  assert words.previous.tolist() == [A, B]
  expected = -np.mean(np.log(model.probability(np.array([A, B]), np.array([B, A]))))
  assert model.content_loss([batch], config, 6) == pytest.approx(float(expected))
  assert math.isfinite(float(expected))


def test_content_loss_of_a_decoder_by_hand():
  config = config_lib.DecoderConfig(
      family='llama', vocab_size=6, d_model=4, d_head=2, d_ff=4, num_heads=2, num_kv_heads=1,
      num_layers=1, eos_ids=(1,),
  )
  rows = packing.LmBatches(corpus=CORPUS, batch_size=2, sequence_length=3, fixed=True)
  # The rows are a b a | b EOS a | c EOS and so on: the pair b a is whole though a row ends in it.
  model = trained()
  pairs = [(A, B), (B, A), (A, B), (A, C)]
  expected = -np.mean([np.log(model.probability(np.array([v]), np.array([w]))) for v, w in pairs])
  batches = [rows.batch(i) for i in range(rows.num_batches)]
  assert model.content_loss(batches, config, 0) == pytest.approx(float(expected))


def test_one_token_documents_are_refused():
  corpus = batches_lib.Corpus(tokens=np.array([A, B], np.int32), starts=np.array([0, 1, 2]))
  with pytest.raises(UserError, match='two tokens'):
    bigram_lib.Bigram.train(corpus, 6)
