"""Span corruption: T5's lengths, invertibility, and the QMoE reference's exact samples."""

import pathlib

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from moejax import errors
from moejax.data import span_corruption

VECTORS = pathlib.Path(__file__).parent.parent / 'vectors' / 'qmoe' / 'mlm.npz'
VOCAB = 32100


def test_lengths_are_t5s():
  lengths = span_corruption.lengths_for(512)
  assert (lengths.tokens, lengths.targets) == (568, 114)  # as published for T5 at 512 tokens
  noise, spans = span_corruption.noise_counts(568, 0.15, 3.0)
  assert 568 - noise + spans + 1 == 512


def test_mask_by_hand():
  tokens = np.array([10, 11, 12, 13, 14, 15])
  mask = np.array([False, True, True, False, False, True])
  inputs, targets = span_corruption.apply_mask(tokens, mask, vocab_size=100, eos_id=1)
  np.testing.assert_array_equal(inputs, [10, 99, 13, 14, 98, 1])
  np.testing.assert_array_equal(targets, [99, 11, 12, 98, 15, 1])


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 400), st.integers(0, 2**31), st.floats(0.05, 0.6), st.floats(1.0, 6.0),
)
def test_nothing_is_lost(length, seed, density, span):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(3, 1000, length).astype(np.int32)
  inputs, targets = span_corruption.corrupt(
      tokens, rng, VOCAB, noise_density=density, mean_span=span
  )
  noise, spans = span_corruption.noise_counts(length, density, span)
  assert len(inputs) == length - noise + spans + 1
  assert len(targets) == noise + spans + 1
  assert inputs[-1] == targets[-1] == 1
  np.testing.assert_array_equal(
      span_corruption.restore(inputs, targets, VOCAB, spans), tokens
  )


@settings(deadline=None, max_examples=60)
@given(st.integers(3, 600), st.integers(0, 2**31))
def test_every_text_fits_its_static_lengths(inputs_length, seed):
  lengths = span_corruption.lengths_for(inputs_length)
  rng = np.random.default_rng(seed)
  for n in {1, int(rng.integers(1, lengths.tokens + 1)), lengths.tokens}:
    inputs, targets = span_corruption.corrupt(rng.integers(3, 99, n), rng, VOCAB)
    assert len(inputs) <= lengths.inputs and len(targets) <= lengths.targets


def test_noise_positions_are_uniform_inside():
  rng = np.random.default_rng(0)
  share = np.mean([span_corruption.noise_mask(rng, 200) for _ in range(4000)], axis=0)
  assert abs(share.mean() - 0.15) < 1e-9  # the count is exact in every sample
  assert np.all(np.abs(share[20:180] - 0.15) < 0.03)


@pytest.mark.parametrize('bad', [dict(noise_density=0.0), dict(mean_span=0.5)])
def test_bad_parameters_name_the_field(bad):
  with pytest.raises(errors.UserError, match=r'data\.noise_density'):
    span_corruption.lengths_for(64, **bad)


def test_reference_masks():
  golden = np.load(VECTORS)
  rng = np.random.RandomState(8)
  for length in (10, 64, 512):
    rng.seed(8)
    np.testing.assert_array_equal(
        span_corruption.qmoe_noise_mask(rng, length), golden[f'noise_{length}']
    )


def test_reference_samples():
  golden = np.load(VECTORS)
  documents = [0, 1, 2, 3, 4, 5], [0, 1, 2, 3]
  sample = 0
  for passes in documents:
    rng = np.random.RandomState(0)
    for document in passes:
      encoder, decoder = span_corruption.qmoe_corrupt(golden[f'doc{document:02}'], rng)
      np.testing.assert_array_equal(encoder, golden[f'enc{sample:02}'])
      np.testing.assert_array_equal(decoder, golden[f'dec{sample:02}'])
      sample += 1
  assert sample == int(golden['n'])
