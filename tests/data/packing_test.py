"""Packed rows by hand and by property: every token once an epoch, documents apart, by index."""

import dataclasses

from hypothesis import example, given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from moejax import config as config_lib
from moejax import model, sharding
from moejax.data import batches as batches_lib
from moejax.data import packing

EOS = 1
A, B, C, D = [10, 11, 12], [20], [30, 31, 32, 33, 34], [40]


def corpus_of(*documents):
  starts = np.cumsum([0] + [len(d) for d in documents])
  return batches_lib.Corpus(tokens=np.concatenate(documents).astype(np.int32), starts=starts)


def make(sizes=(50, 7, 123, 1, 300, 33), **overrides):
  """Documents whose tokens are all different, so that each can be found again."""
  starts = np.cumsum([0, *sizes])
  corpus = batches_lib.Corpus(tokens=np.arange(3, 3 + starts[-1], dtype=np.int32), starts=starts)
  return packing.LmBatches(**(dict(corpus=corpus, batch_size=4, sequence_length=32) | overrides))


# --- By hand

# The stream of A, B, C and D is 10 11 12 EOS | 20 EOS 30 31 | 32 33 34 EOS | 40 EOS.
HAND = {
    'tokens': [[10, 11, 12, 1], [20, 1, 30, 31], [32, 33, 34, 1], [40, 1, 0, 0]],
    'targets': [[11, 12, 1, 0], [1, 0, 31, 32], [33, 34, 1, 0], [1, 0, 0, 0]],
    'weights': [[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]],
    'segments': [[1, 1, 1, 1], [1, 1, 2, 2], [1, 1, 1, 1], [1, 1, 0, 0]],
    'positions': [[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 2, 3], [0, 1, 0, 0]],
}


def test_fixed_rows_by_hand():
  made = packing.LmBatches(
      corpus=corpus_of(A, B, C, D), batch_size=4, sequence_length=4, fixed=True
  )
  assert (made.stream_tokens, made.num_samples, made.num_batches) == (14, 4, 1)
  assert (made.num_tokens, made.num_documents) == (10, 4)
  batch = made.batch(0)
  assert {name: array.tolist() for name, array in batch.items()} == HAND
  assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
      name: (array.shape, array.dtype) for name, array in made.spec.items()
  }
  assert batch['tokens'].dtype == np.int32 and batch['weights'].dtype == np.float32


def test_rows_past_the_end_of_a_fixed_set_are_padding():
  made = packing.LmBatches(
      corpus=corpus_of(A, B), batch_size=3, sequence_length=4, fixed=True, pad_id=9
  )
  batch = made.batch(0)
  assert batch['tokens'].tolist() == [[10, 11, 12, 1], [20, 1, 9, 9], [9, 9, 9, 9]]
  assert batch['targets'].tolist() == [[11, 12, 1, 9], [1, 9, 9, 9], [9, 9, 9, 9]]
  assert batch['weights'].sum(1).tolist() == [3, 1, 0]
  assert batch['segments'].sum(1).tolist() == [4, 2, 0]


# C from its token 2 on, then A and B whole, then what was cut off: C's first two tokens.
CUT = packing.Stream(documents=np.array([2, 0, 1, 2]), ends=np.array([4, 8, 10, 12]), cut=2)


@pytest.mark.parametrize('begin, count, documents, begins, lengths', [
    (0, 4, [2], [2], [4]),
    (2, 7, [2, 0, 1], [4, 0, 0], [2, 4, 1]),
    (5, 2, [0], [1], [2]),
    (7, 1, [0], [3], [1]),
    (9, 3, [1, 2], [1, 0], [1, 2]),
])
def test_parts_of_a_cut_stream_by_hand(begin, count, documents, begins, lengths):
  parts = packing.parts_of(CUT, begin, count)
  assert [array.tolist() for array in parts] == [documents, begins, lengths]


def test_a_row_of_a_cut_stream_by_hand():
  parts = packing.parts_of(CUT, 2, 7)
  row = packing.lay_out(corpus_of(A, B, C), parts, 8, EOS, 0)
  assert {name: array.tolist() for name, array in row.items()} == {
      'tokens': [34, 1, 10, 11, 12, 1, 20, 0],
      'targets': [1, 0, 11, 12, 1, 0, 1, 0],
      'weights': [1, 0, 1, 1, 1, 0, 1, 0],
      'segments': [1, 1, 2, 2, 2, 2, 3, 0],
      'positions': [0, 1, 0, 1, 2, 3, 0, 0],
  }


# --- By property

documents_of = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def stream_of(made, epochs):
  """The tokens of so many epochs in stream order: a dict of flat arrays, and each token's row."""
  size = epochs * made.stream_tokens
  count = -(-size // made.sequence_length)  # rows that begin in these epochs
  kept = sorted((made.begin_of(index), index) for index in range(count))
  assert [begin for begin, _ in kept] == [i * made.sequence_length for i in range(count)]
  indices = np.repeat([index for _, index in kept], made.sequence_length)
  flat = [made.row(index) for _, index in kept]
  stream = {name: np.concatenate([row[name] for row in flat])[:size] for name in flat[0]}
  return stream, indices[:size]


def check_epoch(made, epoch):
  """Every token of the corpus stands once in these arrays and is a target once, if not a first."""
  corpus = made.corpus
  ends = np.full(corpus.num_documents, EOS)
  np.testing.assert_array_equal(
      np.sort(epoch['tokens']), np.sort(np.concatenate((corpus.tokens, ends)))
  )
  learned = epoch['targets'][epoch['weights'] > 0]
  rest = np.delete(corpus.tokens, corpus.starts[:-1])
  np.testing.assert_array_equal(np.sort(learned), np.sort(np.concatenate((rest, ends))))
  last = np.isin(epoch['tokens'], corpus.tokens[corpus.starts[1:] - 1])
  inside = (epoch['tokens'] != EOS) & ~last
  np.testing.assert_array_equal(epoch['targets'][inside], epoch['tokens'][inside] + 1)
  assert (epoch['targets'][last] == EOS).all()
  np.testing.assert_array_equal(epoch['weights'] > 0, epoch['tokens'] != EOS)


def check_segments(made, row):
  """No segment holds tokens of two documents, and each counts its positions from 0."""
  used = int((row['segments'] > 0).sum())
  numbers = row['segments'][:used]
  assert not row['segments'][used:].any() and not row['weights'][used:].any()
  assert set(np.diff(np.append(0, numbers)).tolist()) <= {0, 1}
  for number in range(1, int(numbers.max(initial=0)) + 1):
    inside = numbers == number
    tokens = row['tokens'][:used][inside]
    np.testing.assert_array_equal(row['positions'][:used][inside], np.arange(len(tokens)))
    text = tokens[:-1] if tokens[-1] == EOS else tokens
    assert (np.diff(text) == 1).all() and EOS not in text
    owners = np.searchsorted(made.corpus.starts, text - 3, side='right')
    assert len(set(owners.tolist())) <= 1


@settings(deadline=None, max_examples=60)
@given(documents_of, st.integers(1, 50), st.integers(0, 99))
@example([7], 20, 0)
@example([7, 7], 8, 0)
@example([63, 63], 64, 1)
def test_every_token_is_learned_once_an_epoch(sizes, length, seed):
  made = make(sizes, sequence_length=length, seed=seed)
  stream, rows = stream_of(made, 3)
  for i in range(3):
    span = slice(i * made.stream_tokens, (i + 1) * made.stream_tokens)
    check_epoch(made, {name: array[span] for name, array in stream.items()})
  for index in np.unique(rows):
    row = made.row(int(index))
    assert row['segments'].all()  # no padding in training
    check_segments(made, row)


@settings(deadline=None, max_examples=60)
@given(documents_of, st.integers(1, 50))
def test_a_fixed_set_holds_every_token_once_in_order(sizes, length):
  made = make(sizes, sequence_length=length, fixed=True)
  rows = [made.row(i) for i in range(made.num_samples)]
  for row in rows:
    check_segments(made, row)
  whole = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
  padding = made.num_samples * length - made.stream_tokens
  assert 0 <= padding < length
  np.testing.assert_array_equal(
      np.flatnonzero(whole['segments'] == 0), np.arange(made.stream_tokens, len(whole['segments']))
  )
  check_epoch(made, {name: array[: made.stream_tokens] for name, array in whole.items()})
  text = whole['tokens'][: made.stream_tokens]
  np.testing.assert_array_equal(text[text != EOS], made.corpus.tokens)
  other = dataclasses.replace(made, seed=5)
  np.testing.assert_array_equal(other.batch(0)['tokens'], made.batch(0)['tokens'])


# --- Epochs and indices


def test_epochs_differ_in_the_order_of_documents_rows_and_cuts():
  made = make()
  streams = [made._stream(epoch).documents.tolist() for epoch in range(3)]
  assert len({tuple(s) for s in streams}) == 3
  begins = [made.begin_of(i) for i in range(2 * made.num_samples)]
  assert begins != sorted(begins)
  rows = lambda epoch: {
      made.row(epoch * made.num_samples + i)['tokens'].tobytes() for i in range(made.num_samples)
  }
  assert len(rows(0)) == made.num_samples and not rows(0) & rows(1)
  assert not rows(0) & {dataclasses.replace(made, seed=4).row(i)['tokens'].tobytes()
                        for i in range(made.num_samples)}


def test_one_long_document_is_cut_anew_in_each_epoch():
  made = make((32 * 20 - 1,))
  firsts = []
  for epoch in range(4):
    rows = [made.row(epoch * 20 + i) for i in range(20)]
    firsts.append(frozenset(int(row['tokens'][0]) % 32 for row in rows))
  assert len(set(firsts)) == 4


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=20))
def test_a_row_depends_on_nothing_but_its_index(indices):
  one, two = make(), make()
  one.batch(7)
  for index in indices:
    for name, array in one.row(index).items():
      np.testing.assert_array_equal(two.row(index)[name], array)


def test_epoch_of_counts_tokens():
  made = make((31, 63), batch_size=3)  # 32 + 64 tokens, three rows
  assert [made.epoch_of(i) for i in (0, 1, 4)] == [0.0, 1.0, 4.0]


# --- On devices, and in a model


@pytest.mark.parametrize('mesh', [(1, 1, 1), (8, 1, 1), (2, 2, 2)])
def test_global_batches_equal_local_ones(mesh):
  made = make(batch_size=8)
  placed = sharding.batch_sharding(
      sharding.make_mesh(config_lib.MeshConfig(data=mesh[0], expert=mesh[1], tensor=mesh[2]))
  )
  whole, got = made.batch(5), batches_lib.to_global(made, 5, placed)
  assert got.keys() == whole.keys()
  for name, array in whole.items():
    assert got[name].sharding.is_equivalent_to(placed, 2) and got[name].dtype == array.dtype
    np.testing.assert_array_equal(got[name], array)


def test_a_row_is_made_once_for_all_its_arrays_and_devices(monkeypatch):
  made, asked, row = make(batch_size=8), [], packing.LmBatches.row
  monkeypatch.setattr(packing.LmBatches, 'row', lambda self, i: asked.append(i) or row(self, i))
  mesh = sharding.make_mesh(config_lib.MeshConfig(data=2, expert=2, tensor=2))
  batches_lib.to_global(made, 2, sharding.batch_sharding(mesh))
  assert sorted(asked) == list(range(16, 24))


def test_packed_documents_do_not_see_each_other_in_a_model():
  config = config_lib.DecoderConfig(
      family='llama', vocab_size=64, d_model=16, d_head=8, d_ff=16, num_heads=2, num_kv_heads=1,
      num_layers=1,
  )
  params = model.init_params(config, jax.random.key(0))
  logits = lambda made: np.asarray(model.forward(config, params, made.batch(0)).logits_btv)
  make_one = lambda *documents: packing.LmBatches(
      corpus=corpus_of(*documents), batch_size=2, sequence_length=8, fixed=True
  )
  packed, alone = logits(make_one(A, B)), logits(make_one(B))
  np.testing.assert_allclose(packed[0, 4:6], alone[0, :2], atol=1e-6)
  assert np.isfinite(packed).all()  # the second row is all padding
