"""Layouts by architecture: what a tokenizer must have, where documents end, what does not fit."""

import pytest

from moejax import config as config_lib
from moejax.data import batches, layout, packing, tokenizer
from moejax.errors import UserError

TEXT = 'we the people of the united states in order to form a more perfect union ' * 20
DATA = config_lib.DataConfig(encoder_length=24, sequence_length=16, num_sentinels=10)


def decoder(**overrides):
  values = dict(
      family='llama', vocab_size=320, d_model=8, d_head=4, d_ff=8, num_heads=2, num_kv_heads=1,
      num_layers=1, eos_ids=(1,),
  )
  return config_lib.DecoderConfig(**(values | overrides))


def encdec(**overrides):
  values = dict(
      family='t5', vocab_size=320, d_model=8, d_kv=4, d_ff=8, num_heads=2, num_layers=1,
      num_decoder_layers=1,
  )
  return config_lib.EncDecConfig(**(values | overrides))


@pytest.fixture(scope='module')
def plain():
  return tokenizer.train([TEXT], 320, 0)


@pytest.fixture(scope='module')
def with_sentinels():
  return tokenizer.train([TEXT], 320, 10)


def make(config, tokens, text=TEXT, data=DATA, **kwargs):
  return layout.make_batches(config, data, [text, 'x'], tokens, batch_size=2, **kwargs)


def test_each_architecture_gets_its_layout(plain, with_sentinels):
  packed = make(decoder(pad_id=7), plain, fixed=True)
  assert isinstance(packed, packing.LmBatches) and packed.fixed
  assert (packed.sequence_length, packed.pad_id, packed.eos_id) == (16, 7, 1)
  assert packed.num_documents == 2  # even one of a single token
  corrupted = make(encdec(), with_sentinels)
  assert isinstance(corrupted, batches.SpanBatches) and not corrupted.fixed
  assert corrupted.lengths.inputs == 24 and corrupted.num_documents == 1
  assert (layout.num_sentinels(decoder(), DATA), layout.num_sentinels(encdec(), DATA)) == (0, 10)


def test_documents_end_with_the_models_first_end_or_the_tokenizers(plain):
  assert make(decoder(eos_ids=(5, 6)), plain).eos_id == 5
  assert make(decoder(eos_ids=()), plain).eos_id == plain.eos_id == 1

  class Endless:
    vocab_size, eos_id = 320, None

  with pytest.raises(UserError, match=r'model\.eos_ids is empty and the tokenizer has no'):
    make(decoder(eos_ids=()), Endless())


@pytest.mark.parametrize('config, fits', [
    (decoder(vocab_size=320), True), (decoder(vocab_size=326), True),
    (decoder(vocab_size=327), False), (decoder(vocab_size=319), False),
    (encdec(vocab_size=320), True), (encdec(vocab_size=326), True),
    (encdec(vocab_size=328), False),
])
def test_the_vocabulary_is_the_tokenizers(config, fits, plain):
  if fits:
    layout.check_tokenizer(config, plain)
  else:
    with pytest.raises(UserError, match='the tokenizer has 320 ids, model.vocab_size is') as error:
      layout.check_tokenizer(config, plain)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('config, data, message', [
    (decoder(), dict(sequence_length=4096), 'the text: a text of .* one sample has 4096: give a '
     'longer text, or shorten the samples .data.sequence_length.'),
    (decoder(rope=None, max_positions=15), {}, r'data\.sequence_length = 16: .*max_positions = 15'),
    (encdec(), dict(num_sentinels=0), r'data\.num_sentinels = 0: a sample of 26 tokens has 1 span'),
    (encdec(), dict(encoder_length=900, num_sentinels=100), 'tokenizer has 10 sentinels, a sample'),
])
def test_what_does_not_fit_is_one_line(config, data, message, with_sentinels):
  settings = config_lib.DataConfig(**(dict(encoder_length=24, sequence_length=16) | data))
  with pytest.raises(UserError, match=message) as error:
    make(config, with_sentinels, data=settings, name='the text')
  assert '\n' not in str(error.value)


def test_learned_positions_may_all_be_used(plain):
  assert make(decoder(rope=None, max_positions=16), plain).sequence_length == 16


def test_sentinels_are_the_tokenizers_where_a_model_has_ids_to_spare(with_sentinels):
  """T5's tokenizer has 32100 ids, its models 32128."""
  made = make(encdec(vocab_size=326), with_sentinels, fixed=True)
  first = with_sentinels.first_sentinel
  assert first == 310 and with_sentinels.vocab_size == 320
  row = made.row(0)
  used = row['targets'][row['weights'] > 0]
  assert used[0] == 319 and used.max() < 320
  text = with_sentinels.decode(row['encoder_tokens'], skip_special=False)
  assert '<extra_id_0>' in text and '<unused' not in text
