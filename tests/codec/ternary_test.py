"""The moejax ternary format: size, exactness, random access, damage."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.codec import ternary, ternary_jax
from moejax.errors import UserError


def sample(shape, zero_share, seed=0):
  p = [zero_share, (1 - zero_share) / 2, (1 - zero_share) / 2]
  return np.random.default_rng(seed).choice(3, size=shape, p=p).astype(np.uint8)


def entropy(zero_share):
  one = (1 - zero_share) / 2
  return -zero_share * np.log2(zero_share) - 2 * one * np.log2(one)


def jax_symbols(encoded):
  """Every matrix decoded under jit, as symbols."""
  e, rows, cols = encoded.shape
  designs = tuple(int(d) for d in np.unique(encoded.design_e))
  offsets = encoded.offsets_eb
  longest = int((offsets[:, -1].astype(int) - offsets[:, 0]).max())

  @jax.jit
  def decode(words, row, index):
    return ternary_jax.decode_matrix(
        words, jnp.int32(0), row, index, designs=designs, rows=rows, cols=cols,
        block_rows=encoded.block_rows, max_words=longest,
    )

  out = [
      decode(encoded.words_w[None], offsets[i], np.int32(designs.index(encoded.design_e[i])))
      for i in range(e)
  ]
  return np.asarray(jnp.stack(out)).astype(int) % 3, designs


def to_symbols(mod3):
  """{-1, 0, 1} modulo 3 is {2, 0, 1}: low and high swapped."""
  return np.where(mod3 == 2, 1, np.where(mod3 == 1, 2, 0))


@pytest.mark.parametrize(
    'rows,cols,limit', [(768, 3072, 0.68), (2080, 6144, 0.68), (3072, 768, 0.73)]
)
def test_bits_a_weight_with_all_metadata(rows, cols, limit):
  encoded = ternary.encode(sample((1, rows, cols), 0.885))
  levels = 2 * 16 * rows
  assert (encoded.bits + levels) / (rows * cols) <= limit


@pytest.mark.parametrize('zero_share', [0.80, 0.83, 0.85, 0.885, 0.91, 0.93, 0.95])
@pytest.mark.parametrize('rows,cols', [(768, 3072), (3072, 768)])
def test_codes_stay_within_15_percent_of_the_entropy(rows, cols, zero_share):
  encoded = ternary.encode(sample((1, rows, cols), zero_share, seed=1))
  rate = 16 * encoded.words_w.size / (rows * cols)
  assert entropy(zero_share) * 0.99 < rate <= entropy(zero_share) * 1.10


@pytest.mark.parametrize('zero_share,limit', [(0.0, 1.61), (1 / 3, 1.61), (0.6, 1.4), (1.0, 0.02)])
def test_far_denser_and_sparser_matrices(zero_share, limit):
  symbols = sample((2, 96, 512), zero_share)
  encoded = ternary.encode(symbols)
  assert 16 * encoded.words_w.size / symbols.size <= limit
  assert np.array_equal(ternary.decode(encoded), symbols)


def test_tables_are_chosen_for_each_matrix():
  shares = (0.4, 0.8, 0.885, 0.96, 1.0)
  symbols = np.stack([sample((64, 400), p, seed=i) for i, p in enumerate(shares)])
  encoded = ternary.encode(symbols)
  assert (np.diff(encoded.design_e.astype(int)) > 0).all()
  for i in range(len(shares)):
    alone = ternary.encode(symbols[i : i + 1], block_rows=1)
    assert alone.design_e[0] == encoded.design_e[i]
    sizes = [
        ternary.encode(symbols[i : i + 1], block_rows=1, designs=np.array([d])).words_w.size
        for d in range(14)
    ]
    assert alone.words_w.size <= 1.02 * min(sizes)


def test_one_sided_and_empty_rows_cost_less_than_a_bit():
  symbols = sample((1, 64, 768), 0.885)
  symbols[symbols == 1] = 2
  for matrix in (symbols, np.zeros_like(symbols)):
    encoded = ternary.encode(matrix)
    assert (encoded.bits + 32 * 64) / matrix.size < 1
    assert np.array_equal(ternary.decode(encoded), matrix)


@settings(deadline=None, max_examples=60)
@given(
    symbols=npst.arrays(
        np.uint8, npst.array_shapes(min_dims=3, max_dims=3, max_side=23),
        elements=st.integers(0, 2), fill=st.integers(0, 2),
    ),
    block_rows=st.one_of(st.none(), st.integers(1, 24)),
)
def test_any_ternary_matrix_comes_back(symbols, block_rows):
  encoded = ternary.encode(symbols, block_rows=block_rows)
  assert np.array_equal(ternary.decode(encoded), symbols)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1), zero_share=st.floats(0, 1), rows=st.integers(1, 40),
    cols=st.integers(1, 200), design=st.integers(0, 13),
)
def test_any_matrix_comes_back_with_any_table(seed, zero_share, rows, cols, design):
  symbols = sample((1, rows, cols), zero_share, seed)
  encoded = ternary.encode(symbols, block_rows=3, designs=np.array([design]))
  assert np.array_equal(ternary.decode(encoded), symbols)


@pytest.mark.parametrize(
    'shape,block_rows',
    [((1, 1, 1), None), ((2, 1, 701), None), ((3, 5, 1), 2), ((4, 33, 97), 8), ((2, 7, 5000), 3)],
)
def test_decoding_under_jit_equals_the_host(shape, block_rows):
  shares = np.linspace(0.0, 1.0, shape[0])
  symbols = np.stack([sample(shape[1:], p, seed=i) for i, p in enumerate(shares)])
  encoded = ternary.encode(symbols, block_rows=block_rows)
  mod3, _ = jax_symbols(encoded)
  assert np.array_equal(to_symbols(mod3), symbols)


def test_rows_are_read_without_their_neighbours():
  symbols = sample((3, 50, 640), 0.885)
  encoded = ternary.encode(symbols, block_rows=4)
  # Everything outside the blocks of rows 8..15 of matrix 1 is overwritten.
  words = np.full_like(encoded.words_w, 65535)
  first, last = (int(encoded.offsets_eb[1, b]) for b in (2, 4))
  words[first:last] = encoded.words_w[first:last]
  alone = dataclasses.replace(encoded, words_w=words)
  assert np.array_equal(ternary.decode_rows(alone, 1, 9, 15), symbols[1, 9:15])
  with pytest.raises(UserError, match='in no table'):
    ternary.decode_rows(alone, 1, 7, 15)


def test_blocks_have_a_useful_size():
  for rows, cols in ((768, 3072), (3072, 768), (2080, 6144), (3, 5), (1, 10**6)):
    block = ternary.default_block_rows(rows, cols)
    assert 1 <= block <= rows
    assert block == rows or ternary.BLOCK_WEIGHTS <= block * cols < 2 * max(
        ternary.BLOCK_WEIGHTS, cols
    )


@pytest.mark.parametrize('change', ['cut', 'swap', 'shift'])
def test_damage_is_noticed(change):
  encoded = ternary.encode(sample((1, 32, 640), 0.885), block_rows=4)
  words, offsets = encoded.words_w.copy(), encoded.offsets_eb.copy()
  if change == 'cut':
    words = words[:-3]
  elif change == 'swap':
    words[:] = words[::-1].copy()
  else:
    offsets[0, 3] += 5
  damaged = dataclasses.replace(encoded, words_w=words, offsets_eb=offsets)
  with pytest.raises(UserError, match='restore the file'):
    ternary.decode(damaged)


@pytest.mark.parametrize(
    'symbols',
    [np.full((1, 2, 2), 3), np.full((1, 2, 2), -1), np.zeros((2, 2)), np.zeros((1, 0, 2))],
)
def test_bad_symbols_are_refused(symbols):
  with pytest.raises(UserError):
    ternary.encode(symbols)
