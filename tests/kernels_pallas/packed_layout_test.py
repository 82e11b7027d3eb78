"""Packed symbols: exact round trips at every width, at the stated size."""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.packed_matmul import layout


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1), bits=st.sampled_from([2, 3, 4, 8]), cols=st.integers(1, 140),
)
def test_round_trip(seed, bits, cols):
  symbols = np.random.default_rng(seed).integers(0, 1 << bits, size=(2, cols, 3))
  words = layout.pack(symbols, bits)
  assert words.dtype == np.uint32
  assert words.shape == (2, layout.words_per_column(cols, bits), 3)
  assert np.array_equal(layout.unpack(words, cols, bits), symbols)


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('cols', [1, 33])
def test_unpacking_under_jit(bits, cols):
  symbols = np.random.default_rng(0).integers(0, 1 << bits, size=(2, cols, 3))
  words = jnp.asarray(layout.pack(symbols, bits))
  unpack = jax.jit(layout.unpack, static_argnums=(1, 2))
  assert np.array_equal(unpack(words, cols, bits), symbols)


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_no_bit_is_wasted_on_whole_words(bits):
  assert layout.words_per_column(96, bits) * 32 == 96 * bits


def test_hand_packed_words():
  column = lambda *symbols: np.array(symbols)[:, None]
  words = lambda symbols, bits: layout.pack(symbols, bits)[:, 0].tolist()
  assert words(column(1, 2, 3, 0), 2) == [1 | 2 << 2 | 3 << 4]
  assert words(column(5, 2, 7), 3) == [1 | 2 << 2 | 3 << 4, 1 | 0 << 1 | 1 << 2]
  assert words(column(15, 9), 4) == [15 | 9 << 4]
  assert words(column(0x5A, 0xC3), 8) == [0xA | 3 << 4, 5 | 0xC << 4]


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_a_piece_is_that_part_of_the_whole(bits):
  symbols = np.random.default_rng(0).integers(0, 1 << bits, size=(130, 5))
  words = layout.pack(symbols, bits)
  piece = jax.jit(layout.piece, static_argnums=(1, 2, 4))
  for first in (0, 32, 96):
    got = piece(jnp.asarray(words), 130, bits, first, 32)
    assert np.array_equal(got, symbols[first : first + 32])


@pytest.mark.parametrize('symbol', [-1, 4])
def test_symbols_that_do_not_fit_are_refused(symbol):
  with pytest.raises(ValueError, match='do not fit 2 bits'):
    layout.pack(np.array([[0], [symbol]]), 2)
