"""The QMoE v1 format equals the reference implementation's files, bit for bit."""

import hashlib
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from moejax.codec import qmoe_v1
from moejax.errors import UserError

VECTORS = Path(__file__).parent.parent / 'vectors' / 'qmoe'
ENCODE = ('p885', 'p60', 'p97', 'odd', 'edge')
LINEAR = ('gptq', 'synthetic', 'degenerate')


def test_dictionary_is_the_reference_dictionary():
  tables = qmoe_v1.dictionary()
  for array, digest in (
      (tables.decode_words, 'c09862c453fe122634070a475357ff81a679aff65829d84a56f806c02a54ed45'),
      (tables.trie, 'fc77a88c6c9c32a0a884b2736ac78c25239a162817d133dc8457c8f0770a8b0b'),
  ):
    assert array.dtype == np.int32
    assert hashlib.sha256(array.astype('<i4').tobytes()).hexdigest() == digest


def test_entries_say_what_the_reference_table_says():
  tables = qmoe_v1.dictionary()
  words = tables.decode_words.view(np.uint32).reshape(-1, 2)
  symbols = ((words[..., None] >> (4 + 2 * np.arange(14, dtype=np.uint32))) & 3).reshape(-1, 28)
  assert np.array_equal(tables.entries & 31, 2 * (words[:, 0] & 15))
  ours = np.zeros_like(symbols)
  for shift in (5, 11, 17):
    field = (tables.entries >> shift) & 63
    (used,) = np.nonzero(field != 63)
    ours[used, field[used] >> 1] = 1 + (field[used] & 1)
  assert np.array_equal(ours, symbols)


@pytest.mark.parametrize('name', ENCODE)
def test_codes_and_offsets_are_exact(name):
  vectors = np.load(VECTORS / 'encode.npz')
  symbols = vectors[f'wtern_{name}']
  codes, offsets = qmoe_v1.encode(symbols)
  assert codes.dtype == np.uint16
  assert offsets.dtype == np.int32
  assert np.array_equal(codes, vectors[f'codes_{name}'])
  assert np.array_equal(offsets, vectors[f'row_off_{name}'])
  assert np.array_equal(qmoe_v1.decode(codes, offsets, symbols.shape[1]), symbols)


@pytest.mark.parametrize('name', LINEAR)
def test_quantised_matrices_are_packed_as_the_reference_packs_them(name):
  vectors = np.load(VECTORS / 'sub1linear.npz')
  symbols, levels = qmoe_v1.labels(vectors[f'{name}_W'])
  codes, offsets = qmoe_v1.encode(symbols)
  assert np.array_equal(codes, vectors[f'{name}_codes'])
  assert np.array_equal(offsets, vectors[f'{name}_row_off'])
  assert np.array_equal(levels.reshape(-1), vectors[f'{name}_minmax'])


@pytest.mark.parametrize('name', ENCODE)
def test_decoding_under_jit(name):
  vectors = np.load(VECTORS / 'encode.npz')
  symbols = vectors[f'wtern_{name}']
  rows, cols = symbols.shape
  codes = vectors[f'codes_{name}']
  decode = jax.jit(
      lambda c, o: qmoe_v1.decode_matrix(c, o, rows=rows, cols=cols, max_words=codes.size)
  )
  values = np.asarray(decode(codes, vectors[f'row_off_{name}']))
  assert np.array_equal(values, np.array([0, -1, 1])[symbols])


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1), zero_share=st.floats(0, 1), rows=st.integers(1, 30),
    cols=st.integers(1, 90),
)
def test_any_ternary_matrix_comes_back(seed, zero_share, rows, cols):
  p = [zero_share, (1 - zero_share) / 2, (1 - zero_share) / 2]
  symbols = np.random.default_rng(seed).choice(3, size=(rows, cols), p=p)
  codes, offsets = qmoe_v1.encode(symbols)
  assert np.array_equal(qmoe_v1.decode(codes, offsets, cols), symbols)


def test_rate_on_the_paper_shape():
  rng = np.random.default_rng(0)
  symbols = rng.choice(3, size=(520, 6144), p=[0.885, 0.0575, 0.0575])
  codes, _ = qmoe_v1.encode(symbols)
  bits = (16 * codes.size + 64 * 521) / symbols.size
  assert 16 / bits == pytest.approx(21.43, abs=0.1)


@pytest.mark.parametrize('change', ['cut', 'reverse', 'offsets'])
def test_damage_is_noticed(change):
  vectors = np.load(VECTORS / 'encode.npz')
  codes, offsets = vectors['codes_p885'].copy(), vectors['row_off_p885'].copy()
  if change == 'cut':
    codes = codes[:-1]
  elif change == 'reverse':
    codes = codes[::-1].copy()
  else:
    offsets[7] += 1
  with pytest.raises(UserError, match='restore the file'):
    qmoe_v1.decode(codes, offsets, 256)


def test_symbols_beyond_ternary_are_refused():
  with pytest.raises(UserError, match='0, 1 and 2'):
    qmoe_v1.encode(np.full((2, 4), 3))
