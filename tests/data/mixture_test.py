"""Mixtures: who gives a row, by hand and by property; both kinds of batches; wrong weights."""

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from moejax import config as config_lib
from moejax import sharding
from moejax.data import batches as batches_lib
from moejax.data import mixture, packing, span_corruption
from moejax.errors import UserError


def corpus(first: int, size: int):
  """Two documents of tokens that no other corpus has."""
  return batches_lib.Corpus(
      tokens=np.arange(first, first + size, dtype=np.int32), starts=np.array([0, size // 3, size])
  )


def packed(first: int, size: int = 200, **overrides):
  values = dict(corpus=corpus(first, size), batch_size=8, sequence_length=16)
  return packing.LmBatches(**(values | overrides))


def spans(first: int, size: int = 200):
  return batches_lib.SpanBatches(
      corpus=corpus(first, size), batch_size=8, lengths=span_corruption.lengths_for(16),
      vocab_size=10_000,
  )


# --- Which source

@pytest.mark.parametrize('weights, want', [
    ((1, 1), [(0, 0), (1, 0), (0, 1), (1, 1)]),
    ((3, 1), [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (0, 4), (1, 1), (0, 5)]),
    ((1, 2, 1), [(1, 0), (0, 0), (2, 0), (1, 1), (1, 2), (0, 1), (2, 1), (1, 3)]),
    ((0, 5, 0), [(1, 0), (1, 1), (1, 2)]),
    ((2.5,), [(0, 0), (0, 1), (0, 2)]),
])
def test_picks_by_hand(weights, want):
  parts = mixture.shares(weights)
  assert [mixture.pick(i, parts) for i in range(len(want))] == want


weights_of = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=6
).filter(any)


@settings(deadline=None, max_examples=100)
@given(weights_of, st.integers(0, 10**12), st.integers(1, 200))
def test_any_run_of_rows_is_near_the_proportions(weights, start, length):
  parts = mixture.shares(weights)
  picked = [mixture.pick(i, parts) for i in range(start, start + length)]
  total = sum(Fraction(w) for w in weights)
  for source, weight in enumerate(weights):
    places = [place for where, place in picked if where == source]
    assert places == list(range(places[0], places[0] + len(places))) if places else True
    share = length * Fraction(weight) / total
    assert abs(len(places) - share) < max(len(weights) - 1, 1)
    if places:  # as many rows as its share of all rows before
      assert abs(places[0] - start * Fraction(weight) / total) < max(len(weights), 2)
    if weight == 0:
      assert not places


def test_the_first_rows_number_each_source_from_0():
  parts = mixture.shares((0.7, 0.2, 0.1))
  picked = [mixture.pick(i, parts) for i in range(1000)]
  for source, count in enumerate((700, 200, 100)):
    assert [place for where, place in picked if where == source] == list(range(count))


# --- Rows

@pytest.mark.parametrize('make, name', [(packed, 'tokens'), (spans, 'targets')])
def test_rows_are_those_of_the_sources(make, name):
  sources = (make(100), make(1000, 400), make(5000))
  mixed = mixture.Mixture(sources=sources, weights=(2.0, 1.0, 1.0))
  parts = mixture.shares(mixed.weights)
  seen = {0: 0, 1: 0, 2: 0}
  for index in range(40, 80):
    source, place = mixture.pick(index, parts)
    seen[source] += 1
    for key, array in mixed.row(index).items():
      np.testing.assert_array_equal(array, sources[source].row(place)[key])
  assert seen == {0: 20, 1: 10, 2: 10}
  whole = mixed.batch(3)
  assert {key: array.shape for key, array in whole.items()} == {
      key: array.shape for key, array in mixed.spec.items()
  }
  np.testing.assert_array_equal(mixed.batch(3, slice(2, 5))[name], whole[name][2:5])
  placed = sharding.batch_sharding(sharding.make_mesh(config_lib.MeshConfig(data=4, expert=2)))
  np.testing.assert_array_equal(batches_lib.to_global(mixed, 3, placed)[name], whole[name])


def test_a_small_source_goes_round_while_a_large_one_does_not():
  small, large = packed(100, 60), packed(1000, 3000)
  mixed = mixture.Mixture(sources=(small, large), weights=(1.0, 1.0))
  tokens = np.concatenate([mixed.row(i)['tokens'] for i in range(40)])
  counts = np.bincount(tokens, minlength=4000)
  assert (counts[100:160] >= 4).all() and counts[1000:4000].max() == 1


def test_sizes_add_up():
  sources = (packed(100), packed(1000, 400))
  mixed = mixture.Mixture(sources=sources, weights=(1.0, 1.0))
  assert mixed.num_tokens == 600 and mixed.num_documents == 4 and mixed.batch_size == 8
  assert mixed.num_samples == 13 + 26 and mixed.num_batches == 5
  assert mixed.epoch_of(2) == pytest.approx(16 / 39)


# --- Mistakes

BAD = [
    ((1.0,), r'data\.train_weights = \(1\.0,\): 1 for 2 sources'),
    ((1.0, 1.0, 1.0), '3 for 2 sources'),
    ((1.0, -0.5), 'at least 0'),
    ((1.0, float('nan')), 'at least 0'),
    ((float('inf'), 1.0), 'finite'),
    ((0.0, 0.0), 'at least one above 0'),
]


@pytest.mark.parametrize('weights, message', BAD)
def test_wrong_weights_are_one_line_that_names_the_field(weights, message):
  with pytest.raises(UserError, match=message) as mixed:
    mixture.Mixture(sources=(packed(100), packed(1000)), weights=weights)
  with pytest.raises(UserError, match=message) as settled:
    config_lib.DataConfig(train_files=('a', 'b'), train_weights=weights)
  for error in (mixed, settled):
    assert str(error.value).startswith('data.train_weights = ') and '\n' not in str(error.value)


def test_sources_of_two_layouts_are_refused():
  with pytest.raises(ValueError, match='one layout'):
    mixture.Mixture(sources=(packed(100), spans(100)), weights=(1.0, 1.0))
