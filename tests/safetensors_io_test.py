"""Safetensors against the reference library both ways; every kind of broken file has its line."""

import json
import math

from hypothesis import given, settings
from hypothesis import strategies as st
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from moejax import safetensors_io
from moejax.errors import UserError


def tensors(seed=0):
  rng = np.random.default_rng(seed)
  return {
      'a/b': rng.normal(size=(3, 5)).astype(np.float32),
      'bf': rng.normal(size=(2, 3, 4)).astype(ml_dtypes.bfloat16),
      'half': rng.normal(size=7).astype(np.float16),
      'codes': rng.integers(0, 255, (4, 4), np.uint8),
      'empty': np.zeros((0, 3), np.float32),
      'scalar': np.array(3, np.int32),
      'flags': np.array([True, False, True]),
  }


def write(folder, values, **kwargs):
  return safetensors_io.write_folder(folder, iter(values.items()), **kwargs)


def assert_equal(infos, values):
  assert set(infos) == set(values)
  for name, array in values.items():
    found = infos[name].read()
    assert found.dtype == array.dtype and found.shape == array.shape
    assert found.tobytes() == array.tobytes(), name


def test_the_reference_library_reads_ours(tmp_path):
  values = {k: v for k, v in tensors().items() if k != 'bf'}
  write(tmp_path, values)
  loaded = safetensors.numpy.load_file(tmp_path / 'model.safetensors')
  assert set(loaded) == set(values)
  for name, array in values.items():
    np.testing.assert_array_equal(loaded[name], array)


def test_we_read_the_reference_library(tmp_path):
  values = {k: v for k, v in tensors().items() if k != 'bf'}
  safetensors.numpy.save_file(values, tmp_path / 'model.safetensors', {'format': 'pt'})
  assert_equal(safetensors_io.read_folder(tmp_path), values)


@pytest.mark.parametrize('expected', [None, ('a/b', 'bf'), tuple(tensors())])
@pytest.mark.parametrize('shard_bytes', [1, 60, 1 << 20])
def test_shards_of_any_size_and_any_room_for_the_header(expected, shard_bytes, tmp_path):
  values = tensors()
  weight_map = write(tmp_path, values, expected=expected, shard_bytes=shard_bytes)
  assert set(weight_map) == set(values)
  assert_equal(safetensors_io.read_folder(tmp_path), values)
  for file in set(weight_map.values()):
    with safetensors.safe_open(tmp_path / file, 'np') as opened:
      assert set(opened.keys()) == {k for k, v in weight_map.items() if v == file}
  assert not list(tmp_path.glob('*.tmp'))
  assert (tmp_path / safetensors_io.INDEX).exists() == (len(set(weight_map.values())) > 1)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.text(max_size=30).filter(lambda n: n != '__metadata__'), unique=True, max_size=8),
    st.integers(50, 400), st.data(),
)
def test_any_names_and_shapes_come_back(tmp_path_factory, names, shard_bytes, data):
  shapes = st.lists(st.integers(0, 5), max_size=4)
  values = {n: np.random.default_rng(0).normal(size=data.draw(shapes)) for n in names}
  folder = tmp_path_factory.mktemp('st')
  write(folder, values, shard_bytes=shard_bytes)
  assert_equal(safetensors_io.read_folder(folder), values)


def test_chunks_are_written_as_they_come(tmp_path):
  array = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
  chunked = safetensors_io.Chunked((4, 3, 2), array.dtype, lambda: (a.T for a in array))
  np.testing.assert_array_equal(chunked.assemble(), array.transpose(0, 2, 1))
  write(tmp_path, {'x': chunked})
  np.testing.assert_array_equal(
      safetensors_io.read_folder(tmp_path)['x'].read(), array.transpose(0, 2, 1)
  )


def test_one_row_is_one_row(tmp_path):
  values = tensors()
  write(tmp_path, values)
  info = safetensors_io.read_folder(tmp_path)['bf']
  assert info.row(1).tobytes() == values['bf'][1].tobytes() and info.row(1).shape == (3, 4)
  assert not info.read().flags.writeable


def test_a_wrong_number_of_chunks_is_a_bug_not_a_file(tmp_path):
  chunked = safetensors_io.Chunked((4, 2), np.dtype(np.float32), lambda: [np.zeros((2, 2))])
  with pytest.raises(ValueError, match='its shape needs 32'):
    write(tmp_path, {'x': chunked})


def broken(tmp_path, change):
  write(tmp_path, tensors())
  file = tmp_path / 'model.safetensors'
  file.write_bytes(change(file.read_bytes()))
  with pytest.raises(UserError) as error:
    safetensors_io.read_folder(tmp_path)
  text = str(error.value)
  assert str(file) in text and 'restore or download it again' in text and '\n' not in text
  return text


@pytest.mark.parametrize('keep', [0, 5, 8, 100, -1, -100])
def test_truncated_at_any_point(keep, tmp_path):
  broken(tmp_path, lambda data: data[:keep])


def test_padded(tmp_path):
  assert 'truncated or padded' in broken(tmp_path, lambda data: data + b'x')


def test_an_absurd_header_length(tmp_path):
  broken(tmp_path, lambda data: (1 << 62).to_bytes(8, 'little') + data[8:])


@pytest.mark.parametrize(
    'old, new',
    [
        (b'"F32"', b'"F3x"'), (b'{"__met', b'["__met'), (b'[3,5]', b'[3,6]'), (b'[3,5]', b'["]]'),
        (b'"shape"', b'"shope"'), (b'"data_offsets":[0,', b'"data_offsets":[4,'),
    ],
)
def test_a_corrupt_header(old, new, tmp_path):
  broken(tmp_path, lambda data: data.replace(old, new, 1))


def test_every_flipped_header_byte_is_noticed_or_harmless(tmp_path):
  """Never an exception of another kind, whatever the byte."""
  write(tmp_path, {'x': np.ones((2, 3), np.float32)}, expected=('x',))
  file = tmp_path / 'model.safetensors'
  data = bytearray(file.read_bytes())
  refused = 0
  for i in range(len(bytes(data).split(b'}}')[0]) + 2):
    changed = bytearray(data)
    changed[i] ^= 0x15
    file.write_bytes(changed)
    try:
      infos = safetensors_io.read_folder(tmp_path)
      assert sum(math.prod(info.shape) for info in infos.values()) <= 6
    except UserError:
      refused += 1
  assert refused > 60


def sharded(tmp_path):
  weight_map = write(tmp_path, tensors(), shard_bytes=60)
  assert len(set(weight_map.values())) > 2
  return weight_map, tmp_path / safetensors_io.INDEX


def test_a_missing_shard(tmp_path):
  weight_map, _ = sharded(tmp_path)
  (tmp_path / weight_map['bf']).unlink()
  with pytest.raises(UserError, match=f'{weight_map["bf"]}.*missing'):
    safetensors_io.read_folder(tmp_path)


def test_two_shards_changed_places(tmp_path):
  weight_map, _ = sharded(tmp_path)
  a, b = tmp_path / weight_map['a/b'], tmp_path / weight_map['codes']
  a.rename(tmp_path / 'x')
  b.rename(a)
  (tmp_path / 'x').rename(b)
  with pytest.raises(UserError, match=r"says that .* is in .*, but it is in .*mixed up"):
    safetensors_io.read_folder(tmp_path)


def test_an_index_that_lists_too_much_too_little_or_elsewhere(tmp_path):
  weight_map, index = sharded(tmp_path)
  for changed, message in (
      ({**weight_map, 'ghost': weight_map['bf']}, 'no shard has it'),
      ({k: v for k, v in weight_map.items() if k != 'half'}, 'does not list'),
      ({**weight_map, 'bf': '../model.safetensors'}, 'must lie beside'),
      ({}, 'no weight_map'),
  ):
    index.write_text(json.dumps({'weight_map': changed}))
    with pytest.raises(UserError, match=message):
      safetensors_io.read_folder(tmp_path)


@pytest.mark.parametrize('header', [
    b'[' * 200_000,
    b'{"w":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}',
])
def test_headers_that_make_python_fail(header, tmp_path):
  file = tmp_path / 'model.safetensors'
  file.write_bytes(len(header).to_bytes(8, 'little') + header + bytes(4))
  with pytest.raises(UserError, match='corrupt safetensors header'):
    safetensors_io.read_header(file)
