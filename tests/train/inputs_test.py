"""What a run reads, from text files to batches, for both architectures."""

import dataclasses
import json

import numpy as np
import pytest

from moejax import config as config_lib
from moejax.data import batches, mixture, packing, tokenizer
from moejax.errors import UserError
from moejax.train import inputs, throughput

WORDS = str.split('union state the of people year congress and great law')


def decoder(**overrides):
  values = dict(
      family='grin', vocab_size=320, d_model=16, d_head=8, d_ff=32, num_heads=2, num_kv_heads=1,
      num_layers=1, eos_ids=(1,), moe=config_lib.DecoderMoeConfig(num_experts=2),
  )
  return config_lib.DecoderConfig(**(values | overrides))


def encdec():
  return config_lib.EncDecConfig(
      family='t5', vocab_size=320, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1,
      num_decoder_layers=1,
  )


def prose(seed, words=400):
  return ' '.join(np.random.default_rng(seed).choice(WORDS, words))


@pytest.fixture
def folder(tmp_path):
  for name in ('one', 'two'):
    (tmp_path / name).mkdir()
  for seed, name in enumerate(('one/a.txt', 'one/b.md', 'two/c.txt', 'valid.txt')):
    (tmp_path / name).write_text(prose(seed))
  return tmp_path


def experiment(folder, model=None, **data):
  values = dict(
      train_files=(str(folder / 'one'), str(folder / 'two')), encoder_length=24, num_sentinels=10,
      valid_files=(str(folder / 'valid.txt'),), sequence_length=32,
  )
  return config_lib.Experiment(
      model=model or decoder(), data=config_lib.DataConfig(**(values | data)),
      train=config_lib.TrainConfig(batch_size=4),
  )


def test_a_decoder_reads_packed_texts_that_decode_to_themselves(folder, tmp_path):
  data = inputs.load(experiment(folder), tmp_path)
  assert isinstance(data.train, packing.LmBatches) and isinstance(data.valid, packing.LmBatches)
  assert data.tokenizer.num_sentinels == 0 and data.tokenizer.vocab_size == 320
  assert data.train.num_documents == 3 and not data.train.fixed and data.valid.fixed
  rows = [data.valid.row(i) for i in range(data.valid.num_samples)]
  text = np.concatenate([row['tokens'] for row in rows])
  assert data.tokenizer.decode(text) == (folder / 'valid.txt').read_text()
  assert (text == 1).sum() == 1

  # Now with the workdir's tokenizer.
  again = inputs.load(experiment(folder), tmp_path, resuming=True)
  np.testing.assert_array_equal(again.train.batch(5)['tokens'], data.train.batch(5)['tokens'])


def test_an_encoder_decoder_reads_corrupted_texts(folder, tmp_path):
  data = inputs.load(experiment(folder, encdec()), tmp_path)
  assert isinstance(data.train, batches.SpanBatches) and isinstance(data.valid, batches.SpanBatches)
  assert data.tokenizer.num_sentinels == 10 and data.train.num_documents == 3


@pytest.mark.parametrize('model, kind, name', [
    (decoder(), packing.LmBatches, 'tokens'), (encdec(), batches.SpanBatches, 'targets'),
])
def test_weights_make_a_mixture_of_the_entries(model, kind, name, folder, tmp_path):
  config = experiment(folder, model, train_weights=(3, 1), seed=5)
  data = inputs.load(config, tmp_path)
  assert isinstance(data.train, mixture.Mixture) and data.train.weights == (3.0, 1.0)
  one, two = data.train.sources
  assert isinstance(one, kind) and (one.num_documents, two.num_documents) == (2, 1)
  assert len({5, one.seed, two.seed}) == 3
  parts = mixture.shares((3, 1))
  for index in range(8):
    source, place = mixture.pick(index, parts)
    np.testing.assert_array_equal(
        data.train.row(index)[name], data.train.sources[source].row(place)[name]
    )
  again = inputs.train_batches(config, data.tokenizer)
  np.testing.assert_array_equal(again.batch(2)[name], data.train.batch(2)[name])


def test_a_source_of_weight_0_is_not_read(folder, tmp_path):
  (folder / 'two' / 'c.txt').write_text('too short')
  config = experiment(folder, train_weights=(1, 0), tokenizer=str(folder))
  tokenizer.train([prose(0)], 320, 0).save(folder)
  data = inputs.load(config, tmp_path / 'run')
  assert data.train.num_documents == 2
  with pytest.raises(UserError, match=r'data\.train_files: .*/two: a text of \d+ tokens; one '
                                      r'sample has 32: .*sequence_length'):
    inputs.load(experiment(folder, train_weights=(1, 1), tokenizer=str(folder)), tmp_path / 'run')


@pytest.mark.parametrize('model, data, message', [
    (decoder(vocab_size=200), {}, 'vocabulary of 200 ids: needs at least 259'),
    (decoder(eos_ids=(2,)), {}, r'model\.eos_ids = \(2,\): a new tokenizer ends texts with 1'),
    (decoder(), dict(sequence_length=100_000), r'data\.train_files: a text of \d+ tokens; one '
                                               'sample has 100000'),
    (decoder(), dict(valid_files=('nowhere',)), r'data\.valid_files: no file matches nowhere'),
    (decoder(), dict(tokenizer='large'), r'has 400 ids, model\.vocab_size is 320'),
    (decoder(), dict(tokenizer='small'), r'has 280 ids, model\.vocab_size is 320'),
    (encdec(), dict(tokenizer='plain'), 'the tokenizer has 0 sentinels, data.num_sentinels is 10'),
])
def test_mistakes_are_one_line(model, data, message, folder, tmp_path):
  for name, size in (('large', 400), ('small', 280), ('plain', 320)):
    (folder / name).mkdir()
    tokenizer.train([prose(0)], size, 0).save(folder / name)
  data = dict(data)
  if 'tokenizer' in data:
    data['tokenizer'] = str(folder / data['tokenizer'])
  with pytest.raises(UserError, match=message) as error:
    inputs.load(experiment(folder, model, **data), tmp_path / 'run')
  assert '\n' not in str(error.value)


def test_the_settings_of_an_older_run_still_load():
  values = config_lib.to_json(config_lib.DataConfig(train_files=('a', 'b')))
  for name in ('train_weights', 'sequence_length'):
    del values[name]
  old = config_lib.from_json(config_lib.DataConfig, json.loads(json.dumps(values)))
  assert old == config_lib.DataConfig(train_files=('a', 'b'))
  assert old.train_weights == () and old.sequence_length == 512


def test_weights_go_with_the_files_that_a_setting_changes():
  base = config_lib.Experiment(model=decoder())
  changed = config_lib.apply_overrides(
      base, ['train_files=["a", "b"]', 'data.train_weights=[1, 2]']
  )
  assert changed.data.train_weights == (1.0, 2.0)
  with pytest.raises(UserError, match=r'data\.train_weights = .*2 for 1 sources'):
    config_lib.apply_overrides(changed, ['train_files=["a"]'])


def test_the_meter_takes_the_widths_from_the_batches(folder, tmp_path):
  config = dataclasses.replace(
      experiment(folder, encdec()),
      train=config_lib.TrainConfig(batch_size=4, peak_flops_per_second=1e9),
  )
  data = inputs.load(config, tmp_path)
  meter = throughput.make_meter(config, data.train, devices=2)
  lengths = data.train.lengths
  want = throughput.train_flops(config.model, 4, lengths.inputs, lengths.targets)
  assert (meter._flops, meter._peak) == (want, 2e9)
