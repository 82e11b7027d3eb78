"""Evaluation batches: predecessors of hidden words, spreading, layouts from manifests."""

import numpy as np
import pytest

from moejax import config as config_lib
from moejax import files
from moejax.data import batches as batches_lib
from moejax.data import span_corruption
from moejax.data import tokenizer as tokenizer_lib
from moejax.errors import UserError
from moejax.evaluate import samples

CONFIG = config_lib.EncDecConfig(
    vocab_size=64, d_model=4, d_kv=4, d_ff=4, num_heads=1, num_layers=1, num_decoder_layers=1,
    family='t5',
)
SENTINELS = 20


def make(tokens: int = 300, batch_size: int = 4) -> batches_lib.SpanBatches:
  ids = np.random.default_rng(0).integers(2, 44, tokens).astype(np.int32)
  return batches_lib.SpanBatches(
      corpus=batches_lib.Corpus(tokens=ids, starts=np.array([0, tokens // 2, tokens])),
      batch_size=batch_size, lengths=span_corruption.lengths_for(24), vocab_size=64, fixed=True,
  )


def test_predecessors_are_those_of_the_text():
  batches = make()
  seen = 0
  for index in range(batches.num_samples // batches.batch_size):
    batch = batches.batch(index)
    found = samples.previous_tokens(batch, CONFIG, 64 - SENTINELS)
    pairs = list(zip(found.previous.tolist(), found.tokens.tolist()))
    expected = []
    for row in range(batches.batch_size):
      window = batches.window(0, index * batches.batch_size + row).tolist()
      spans = batch['targets'][row][batch['weights'][row] > 0]
      spans_of = np.split(spans, np.flatnonzero(spans >= 64 - SENTINELS))[1:]
      encoder = batch['encoder_tokens'][row].tolist()
      place = 0
      for token in encoder:
        if token >= 64 - SENTINELS:
          hidden = next(s for s in spans_of if s[0] == token)[1:]
          hidden = [t for t in hidden.tolist() if t != 1]
          for t in hidden:
            assert window[place] == t
            expected.append((window[place - 1], t))
            place += 1
        elif place < len(window) and token not in (0, 1):
          assert window[place] == token
          place += 1
    assert pairs == expected
    seen += len(pairs)
  assert seen > 20


def test_a_span_at_the_very_start_has_no_predecessor():
  batch = {
      'encoder_tokens': np.array([[63, 1]]), 'targets': np.array([[63, 5, 1]]),
      'weights': np.ones((1, 3), np.float32),
  }
  found = samples.previous_tokens(batch, CONFIG, 64 - SENTINELS)
  assert found.previous.tolist() == [-1] and found.tokens.tolist() == [5]


def test_spread_takes_batches_from_the_whole_text():
  batches = make(batch_size=1)
  total = batches.num_batches
  all_rows = list(samples.spread(batches, 0))
  assert len(all_rows) == total
  few = list(samples.spread(batches, 3))
  for i, row in enumerate(few):
    np.testing.assert_array_equal(row['targets'], all_rows[i * total // 3]['targets'])


def write(folder, provenance):
  folder.mkdir()
  files.write_json(folder / 'manifest.json', {'provenance': provenance})


def test_layout_comes_from_the_manifest_or_from_what_a_model_was_made_of(tmp_path):
  data = {'encoder_length': 77, 'noise_density': 0.3}
  write(tmp_path / 'trained', {'trained': {'experiment': {'data': data}}})
  write(tmp_path / 'small', {'source': str(tmp_path / 'trained')})
  write(tmp_path / 'loop', {'source': str(tmp_path / 'loop')})
  assert samples.data_config(tmp_path / 'small').encoder_length == 77
  assert samples.data_config(tmp_path / 'small').noise_density == 0.3
  assert samples.data_config(tmp_path / 'loop') == config_lib.DataConfig()
  assert samples.data_config(tmp_path / 'loop', tmp_path / 'trained').encoder_length == 77


DECODER = config_lib.DecoderConfig(
    family='llama', vocab_size=320, d_model=8, d_head=4, d_ff=8, num_heads=2, num_kv_heads=1,
    num_layers=1, eos_ids=(1,),
)


def test_predecessors_of_a_decoders_targets():
  # Two documents: 10 11 12 EOS, 20 21 EOS.
  batch = {
      'tokens': np.array([[10, 11, 12, 1], [20, 21, 1, 0]]),
      'targets': np.array([[11, 12, 1, 0], [21, 1, 0, 0]]),
      'weights': np.array([[1, 1, 1, 0], [1, 1, 0, 0]], np.float32),
  }
  found = samples.previous_tokens(batch, DECODER, 0)
  assert found.previous.tolist() == [10, 11, 20]
  assert found.tokens.tolist() == [11, 12, 21]


def test_a_decoder_is_measured_on_packed_rows_in_order():
  texts = ['we the people of the united states ' * 9, 'in order to form a more perfect union ' * 9]
  made = tokenizer_lib.train(texts, 320, 0)
  data = config_lib.DataConfig(sequence_length=16, seed=3)
  fixed = samples.fixed_batches(DECODER, data, texts, made, batch_size=2)
  rows = list(samples.spread(fixed, 0))
  assert len(rows) == fixed.num_batches > 2
  text = np.concatenate([row['tokens'].ravel() for row in rows])
  assert made.decode(text) == ''.join(texts)
  other = samples.fixed_batches(
      DECODER, config_lib.DataConfig(sequence_length=16), texts, made, batch_size=2
  )
  np.testing.assert_array_equal(other.batch(1)['tokens'], rows[1]['tokens'])
  with pytest.raises(UserError, match='the calibration: a text of .* one sample has 512'):
    samples.fixed_batches(DECODER, config_lib.DataConfig(), texts, made, name='the calibration')


class _Tokenizer:
  vocab_size, first_sentinel = 64, 64 - SENTINELS

  def decode(self, ids, skip_special=True):
    return ' '.join(f'w{i}' for i in ids)


def test_examples_become_text_with_the_spans_put_back():
  example = {'encoder': [5, 6, 63, 8, 1], 'targets': [63, 7, 9, 1], 'guesses': [63, 7, 3, 1]}
  pieces, fills = samples.example_pieces(example, _Tokenizer())
  assert pieces == [
      {'text': 'w5 w6', 'hidden': False}, {'text': 'w7 w9', 'hidden': True},
      {'text': 'w8', 'hidden': False},
  ]
  assert fills == [{'text': 'w7', 'right': True}, {'text': 'w3', 'right': False}]


def test_examples_of_a_decoder_are_the_passage_and_a_guess_a_token():
  example = {'tokens': [5, 6, 1, 8], 'targets': [6, 1, 8, 9], 'guesses': [6, 7, 8, 3]}
  pieces, fills = samples.example_pieces(example, _Tokenizer(), (1, 2))
  assert pieces == [{'text': 'w5 w6 w8', 'hidden': False}]
  assert fills == [
      {'text': 'w6', 'right': True}, {'text': 'w8', 'right': True}, {'text': 'w3', 'right': False}
  ]


def test_a_foreign_tokenizer_is_refused():
  class Other(_Tokenizer):
    vocab_size = 32

  with pytest.raises(UserError, match='32 ids, model.vocab_size is 64'):
    samples.fixed_batches(CONFIG, config_lib.DataConfig(), ['text'], Other())
