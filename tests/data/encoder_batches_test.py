"""Rows for encoders: words masked as BERT has it, and whole texts with what frames them."""

import dataclasses

import numpy as np
import pytest

from moejax.config import DataConfig, EncoderConfig
from moejax.data import layout, masking, whole_texts
from moejax.data import tokenizer as tokenizer_lib
from moejax.errors import UserError

CONFIG = EncoderConfig(
    vocab_size=300, d_model=16, d_head=8, d_ff=32, num_heads=2, num_kv_heads=2, num_layers=1,
    max_positions=64, eos_ids=(1,),
)
TEXTS = [f'the {w} sat on the {v} and looked at {w}. ' * 20
         for w, v in (('cat', 'mat'), ('dog', 'log'), ('hen', 'pen'))]


def tokenizer():
  return tokenizer_lib.train(TEXTS, 300, 1)


def made(config=CONFIG, **kwargs):
  data = DataConfig(sequence_length=32, **kwargs.pop('data', {}))
  return layout.make_batches(config, data, TEXTS, tokenizer(), batch_size=4, **kwargs)


def test_masks_follow_the_shares_of_the_paper():
  rng = np.random.default_rng(0)
  row = {
      'tokens': rng.integers(5, 300, 200_000).astype(np.int32),
      'segments': np.ones(200_000, np.int32),
  }
  row['segments'][-1000:], row['tokens'][:1000] = 0, 1
  got = masking.masked(row, mask_id=4, vocab_size=300, density=0.15, rng=rng, keep=(1,))
  chosen, real = got['weights'] > 0, slice(1000, -1000)
  np.testing.assert_array_equal(got['targets'], row['tokens'])
  np.testing.assert_array_equal(got['tokens'][~chosen], row['tokens'][~chosen])
  assert not chosen[:1000].any() and not chosen[-1000:].any()
  assert chosen[real].mean() == pytest.approx(0.15, abs=0.005)
  mask = got['tokens'][chosen] == 4
  same = got['tokens'][chosen] == row['tokens'][chosen]
  assert mask.mean() == pytest.approx(0.8, abs=0.01)
  assert same.mean() == pytest.approx(0.1, abs=0.01)


def test_rows_are_functions_of_their_index():
  train, again, fixed = made(), made(), made(fixed=True)
  for i in (0, 3):
    for name, array in train.batch(i).items():
      np.testing.assert_array_equal(array, again.batch(i)[name])
      assert array.shape == train.spec[name].shape and array.dtype == train.spec[name].dtype
  epoch = train.num_samples
  assert any(
      (train.row(i)['weights'] != train.row(i + epoch)['weights']).any() for i in range(4)
  )
  np.testing.assert_array_equal(fixed.row(0)['weights'], made(fixed=True).row(0)['weights'])
  assert (train.batch(0)['tokens'] == tokenizer().mask_id).any()


def test_a_mask_is_needed():
  bare = tokenizer_lib.train(TEXTS, 300, 0)
  with pytest.raises(UserError, match='model.mask_id is null'):
    layout.make_batches(CONFIG, DataConfig(sequence_length=32), TEXTS, bare, batch_size=1)
  own = dataclasses.replace(CONFIG, mask_id=7)
  batches = layout.make_batches(own, DataConfig(sequence_length=32), TEXTS, bare, batch_size=8)
  assert (batches.batch(0)['tokens'] == 7).any()


class Framing:
  """A tokenizer that puts 101 before and 102 behind, as BERT's does."""

  def encode(self, text, special=False):
    ids = [ord(c) for c in text]
    return np.array([101, *ids, 102] if special else ids, np.int32)


def test_whole_texts_keep_their_frame_when_cut():
  texts = whole_texts.framed(['abcdefgh', '', 'xy'], Framing(), 6, 'texts')
  assert [list(t) for t in texts] == [[101, *b'abcd', 102], [], [101, *b'xy', 102]]
  row = whole_texts.row_of(texts[2], 6)
  assert row['tokens'].tolist() == [101, *b'xy', 102, 0, 0]
  assert row['segments'].tolist() == [1, 1, 1, 1, 0, 0] and row['positions'][3] == 3
  with pytest.raises(UserError, match='no text with a word'):
    whole_texts.framed(['', ''], Framing(), 6, 'texts')
  with pytest.raises(UserError, match='2 tokens around a text'):
    whole_texts.framed(['abc'], Framing(), 2, 'texts')


def test_a_model_that_tells_of_texts_gets_a_text_a_row():
  config = dataclasses.replace(CONFIG, head='none', pooler=True)
  batches, fixed = made(config), made(config, fixed=True)
  assert batches.num_samples == 3 and batches.num_batches == 1
  assert sorted(map(int, batches.batch(0)['tokens'][:3, 1])) == sorted(
      map(int, fixed.batch(0)['tokens'][:3, 1]))
  assert not fixed.batch(0)['segments'][3].any() and batches.batch(0)['segments'][3].any()
  long = DataConfig(sequence_length=65)
  with pytest.raises(UserError, match='max_positions = 64'):
    layout.make_batches(config, long, TEXTS, tokenizer(), batch_size=1)
