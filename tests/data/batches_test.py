"""Batches by index: every token once an epoch, documents apart, resumable, sharded."""

import dataclasses
import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from moejax import config as config_lib
from moejax import errors, sharding
from moejax.data import batches, span_corruption

ROOT = pathlib.Path(__file__).parents[2]
VOCAB = 1000
PROCESS = '''
import json, sys
import jax
import numpy as np
jax.distributed.initialize(f'localhost:{sys.argv[1]}', 2, int(sys.argv[2]))
from moejax import config, sharding
from moejax.data import batches, mixture, packing

asked = []
class Recorded(mixture.Mixture):
  def row(self, index):
    asked.append(index)
    return super().row(index)

corpus = batches.Corpus(tokens=np.arange(3, 500, dtype=np.int32), starts=np.array([0, 99, 497]))
source = packing.LmBatches(corpus=corpus, batch_size=8, sequence_length=16)
made = Recorded(sources=(source, source), weights=(2.0, 1.0))
placed = sharding.batch_sharding(sharding.make_mesh(config.MeshConfig(data=2)))
tokens = batches.to_global(made, 3, placed)['tokens']
print(json.dumps([list(asked), np.asarray(tokens.addressable_shards[0].data).tolist(),
                  made.batch(3)['tokens'].tolist()]))
'''


def make(sizes=(50, 7, 123, 300, 33, 34), **overrides):
  """Documents whose tokens are all different, so that each can be found again."""
  starts = np.cumsum([0, *sizes])
  corpus = batches.Corpus(tokens=np.arange(3, 3 + starts[-1], dtype=np.int32), starts=starts)
  values = dict(
      corpus=corpus, batch_size=4, lengths=span_corruption.lengths_for(32), vocab_size=VOCAB, seed=3
  )
  return batches.SpanBatches(**(values | overrides))


@pytest.mark.parametrize('fixed', [False, True])
@pytest.mark.parametrize('epoch', [0, 1])
def test_an_epoch_holds_every_token_once(fixed, epoch):
  made = make(fixed=fixed)
  windows = [made.window(epoch, i) for i in range(made.num_samples)]
  np.testing.assert_array_equal(np.concatenate(windows), made.corpus.tokens)
  assert all(1 <= len(w) <= made.lengths.tokens for w in windows)


def test_no_window_crosses_a_document():
  made = make()
  for epoch in range(3):
    for i in range(made.num_samples):
      positions = made.window(epoch, i) - 3
      documents = np.searchsorted(made.corpus.starts, positions, side='right')
      assert len(set(documents.tolist())) == 1


def test_the_spec_is_what_a_batch_has():
  made = make()
  found = {name: (array.shape, array.dtype) for name, array in made.batch(0).items()}
  assert found == {name: (array.shape, array.dtype) for name, array in made.spec.items()}
  assert made.num_tokens == 547 and made.num_documents == 6


def test_samples_come_in_a_new_order_with_new_cuts_and_noise():
  made = make(sizes=(123, 300, 64))
  rows = lambda epoch: [
      made.row(epoch * made.num_samples + i)['encoder_tokens'].tobytes()
      for i in range(made.num_samples)
  ]
  first, second = rows(0), rows(1)
  assert len(set(first)) == made.num_samples and not set(first) & set(second)
  assert first == rows(0)
  assert dataclasses.replace(made, seed=4).row(0)['encoder_tokens'].tobytes() not in first


def test_a_row_restores_its_window():
  made = make()
  row = made.row(5)
  used = int(row['weights'].sum())
  inputs = row['encoder_tokens'][row['encoder_tokens'] != 0]
  text = span_corruption.restore(inputs, row['targets'][:used], VOCAB, made.lengths.spans)
  windows = [made.window(0, i).tolist() for i in range(made.num_samples)]
  assert text.tolist() in windows
  assert row['decoder_tokens'][0] == 0
  np.testing.assert_array_equal(row['decoder_tokens'][1:used], row['targets'][: used - 1])
  assert not row['weights'][used:].any() and not row['targets'][used:].any()


def test_fixed_batches_end_in_padding_without_weight():
  made = make(fixed=True)
  last = made.batch(made.num_batches - 1)
  extra = made.num_batches * made.batch_size - made.num_samples
  assert extra > 0
  assert (last['weights'].sum(1) == 0).sum() == extra
  assert (last['encoder_tokens'] != 0).any(1).all()  # an empty encoder row would divide by zero


def test_rows_do_not_depend_on_how_a_batch_is_split():
  made = make(batch_size=8)
  whole = made.batch(3)
  for part in (slice(0, 4), slice(4, 8)):
    half = made.batch(3, part)
    for name in whole:
      np.testing.assert_array_equal(half[name], whole[name][part])


@pytest.mark.parametrize('mesh', [(1, 1, 1), (8, 1, 1), (2, 2, 2)])
def test_global_batches_equal_local_ones(mesh):
  made = make(batch_size=8)
  placed = sharding.batch_sharding(
      sharding.make_mesh(config_lib.MeshConfig(data=mesh[0], expert=mesh[1], tensor=mesh[2]))
  )
  whole, got = made.batch(2), batches.to_global(made, 2, placed)
  for name, array in whole.items():
    assert got[name].sharding.is_equivalent_to(placed, 2)
    np.testing.assert_array_equal(got[name], array)
    assert got[name].dtype == array.dtype


def test_prefetch_goes_from_start_to_stop_and_passes_errors_on(monkeypatch):
  made = make(batch_size=8)
  placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  got = list(batches.prefetch(made, 3, 6, placed))
  assert [index for index, _ in got] == [3, 4, 5]
  np.testing.assert_array_equal(got[1][1]['targets'], made.batch(4)['targets'])

  def fail(self, index):
    raise errors.UserError('row is broken')

  monkeypatch.setattr(batches.SpanBatches, 'row', fail)
  with pytest.raises(errors.UserError, match='row is broken'):
    list(batches.prefetch(made, 0, 2, placed))


def test_a_process_makes_only_the_rows_of_its_devices():
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = str(probe.getsockname()[1])
  flags = re.sub(r'--xla_force_host_platform_device_count=\d+', '', os.environ['XLA_FLAGS'])
  processes = [
      subprocess.Popen(
          [sys.executable, '-c', PROCESS, port, str(i)], cwd=ROOT, text=True,
          env={**os.environ, 'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)},
          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      )
      for i in range(2)
  ]
  for i, process in enumerate(processes):
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    asked, held, whole = json.loads(stdout)
    assert asked == list(range(24 + 4 * i, 28 + 4 * i))
    assert held == whole[4 * i : 4 * i + 4]
