"""The model folder: what is saved comes back, and nothing broken is ever loaded."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moejax import files, model, safetensors_io, store, tree, weights
from moejax.config import EncDecConfig, EncDecMoeConfig
from moejax.errors import UserError

CONFIG = EncDecConfig(
    vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_heads=2, num_layers=2, num_decoder_layers=2,
    moe=EncDecMoeConfig(num_experts=3),
)
EXPERTS = 'encoder/layers_1/ffn/experts/wi'


@pytest.fixture(scope='module')
def dense():
  shapes = tree.flatten(model.abstract_params(CONFIG))
  rng = np.random.default_rng(0)
  return tree.unflatten({
      path: jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32))
      for path, leaf in shapes.items()
  })


def packed(shape=(3, 16, 24)):
  e, d, f = shape
  symbols = np.random.default_rng(1).integers(0, 4, (e, f, d))
  scale = np.full((e, f), 0.5, np.float32)
  return weights.Packed.from_symbols(symbols, scale, np.full((e, f), 1.0, np.float32), bits=2)


@pytest.fixture
def folder(dense, tmp_path):
  """A model with one compressed weight, in several shards."""
  params = tree.replace(dense, EXPERTS, packed())
  store.save_folder(
      tmp_path / 'm', CONFIG, params, provenance={'seed': 7}, plan={'bits': 2}, shard_bytes=9000
  )
  return tmp_path / 'm'


def assert_same(a, b):
  a, b = tree.flatten(a), tree.flatten(b)
  assert a.keys() == b.keys()
  for path, leaf in a.items():
    assert type(leaf) is type(b[path]) or tree.is_array(leaf), path
    for x, y in zip(jax.tree.leaves(leaf), jax.tree.leaves(b[path])):
      assert x.dtype == y.dtype and np.array_equal(x, y), path


def test_everything_comes_back(folder, dense):
  config, params = store.load_folder(folder)
  assert config == CONFIG
  assert_same(params, tree.replace(dense, EXPERTS, packed()))
  assert isinstance(params['encoder']['layers_1']['ffn']['experts']['wi'], weights.Packed)
  manifest = json.loads((folder / 'manifest.json').read_text())
  assert manifest['provenance'] == {'seed': 7} and manifest['plan'] == {'bits': 2}
  assert manifest['nodes'][EXPERTS]['class'] == 'Packed'
  assert len(list(folder.glob('model-*.safetensors'))) > 3
  for name, entry in manifest['files'].items():
    assert files.sha256(folder / name) == entry['sha256']
  assert set(manifest['files']) | {'manifest.json'} == {p.name for p in folder.iterdir()}


def test_model_load_and_save(dense, tmp_path):
  saved = model.Model(CONFIG, tree.cast_floats(dense, jnp.bfloat16))
  saved.save(tmp_path / 'm', provenance={'from': 'test'})
  loaded = model.Model.load(tmp_path / 'm')
  assert loaded.params['shared']['embedding'].dtype == jnp.bfloat16
  assert loaded.config == CONFIG
  assert_same(loaded.params, saved.params)


def test_the_same_model_gives_the_same_bytes(dense, tmp_path):
  for name in 'ab':
    store.save_folder(tmp_path / name, CONFIG, dense)
  for file in (tmp_path / 'a').iterdir():
    assert file.read_bytes() == (tmp_path / 'b' / file.name).read_bytes()


def test_an_iterator_is_consumed_leaf_by_leaf(dense, tmp_path):
  alive, flat = [0], tree.flatten(dense)

  def leaves():
    for path, leaf in flat.items():
      def chunks(leaf=leaf):
        alive[0] += 1
        yield np.asarray(leaf)
        alive[0] -= 1
      yield path, safetensors_io.Chunked(leaf.shape, np.dtype(leaf.dtype), chunks)
      assert alive[0] == 0  # the one before was written before the next is asked for

  store.save_folder(tmp_path / 'm', CONFIG, leaves())
  assert_same(store.load_folder(tmp_path / 'm')[1], dense)


def test_source_reads_one_leaf_at_a_time(folder, dense):
  source = store.Source(folder)
  assert source.config == CONFIG
  assert set(source.paths()) == set(tree.flatten(dense))
  wo = source.read(EXPERTS[:-2] + 'wo')
  assert isinstance(wo, np.ndarray) and not wo.flags.writeable
  assert np.array_equal(source.read_expert(EXPERTS[:-2] + 'wo', 2), wo[2])
  node = source.read(EXPERTS)
  np.testing.assert_array_equal(node.dense(jnp.float32), packed().dense(jnp.float32))
  shapes = source.abstract(EXPERTS)
  assert shapes.shape == (3, 16, 24) and isinstance(shapes.words, jax.ShapeDtypeStruct)
  assert source.abstract('shared/embedding').shape == (32, 16)
  with pytest.raises(UserError, match='did you mean'):
    source.read('shared/embeding')
  with pytest.raises(UserError, match='is a Packed, not an array'):
    source.read_expert(EXPERTS, 0)


def test_layers_are_ordered_by_number(tmp_path):
  leaves = {f'encoder/layers_{i}/ffn/wi': np.full(1, i, np.float32) for i in (10, 2, 0, 1)}
  store.save_folder(tmp_path / 'm', CONFIG, leaves.items())
  order = [p.split('/')[1] for p in store.Source(tmp_path / 'm').paths()]
  assert order == ['layers_0', 'layers_1', 'layers_2', 'layers_10']


def test_tokenizer_files_come_along(dense, tmp_path):
  (tmp_path / 'tok').mkdir()
  (tmp_path / 'tok' / 'tokenizer.json').write_text('{"t": 1}')
  (tmp_path / 'tok' / 'secret.txt').write_text('no')
  store.save_folder(tmp_path / 'm', CONFIG, dense, tokenizer_from=tmp_path / 'tok')
  assert (tmp_path / 'm' / 'tokenizer.json').read_text() == '{"t": 1}'
  assert not (tmp_path / 'm' / 'secret.txt').exists()
  assert 'tokenizer.json' in json.loads((tmp_path / 'm' / 'manifest.json').read_text())['files']


def test_place_decides_where_leaves_live(folder):
  seen = []
  store.load_folder(folder, place=lambda path, leaf: seen.append((path, type(leaf))))
  assert (EXPERTS, weights.Packed) in seen
  assert all(issubclass(kind, (np.ndarray, weights.WeightNode)) for _, kind in seen)


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
def test_nan_is_refused_on_the_way_out_and_in(dtype, dense, tmp_path):
  good = tree.replace(dense, 'encoder/final_norm', np.ones(16, dtype))
  bad = np.ones(16, dtype)
  bad[5] = np.nan
  with pytest.raises(UserError, match=r'encoder/final_norm.*NaN'):
    store.save_folder(tmp_path / 'm', CONFIG, tree.replace(dense, 'encoder/final_norm', bad))
  assert list(tmp_path.iterdir()) == []
  store.save_folder(tmp_path / 'm', CONFIG, good)
  info = safetensors_io.read_folder(tmp_path / 'm')['encoder/final_norm']
  patch(info.file, info.offset, bad.tobytes())
  refresh_manifest(tmp_path / 'm')
  with pytest.raises(UserError, match=r'model\.safetensors.*encoder/final_norm.*NaN'):
    store.load_folder(tmp_path / 'm')


def patch(file, offset, data):
  with open(file, 'r+b') as f:
    f.seek(offset)
    f.write(data)


def refresh_manifest(folder):
  """Makes the checksums fit again, as an adversary or a patched tool would."""
  manifest = json.loads((folder / 'manifest.json').read_text())
  for name, entry in manifest['files'].items():
    entry |= {'bytes': (folder / name).stat().st_size, 'sha256': files.sha256(folder / name)}
  (folder / 'manifest.json').write_text(json.dumps(manifest))


def edit(folder, name, **changes):
  values = json.loads((folder / name).read_text())
  (folder / name).write_text(json.dumps({**values, **changes}))


def first_shard(folder):
  return sorted(folder.glob('model-*.safetensors'))[0]


def corrupt(folder):
  patch(first_shard(folder), first_shard(folder).stat().st_size - 9, b'\x01')


def swap(folder):
  a, b = sorted(folder.glob('model-*.safetensors'))[:2]
  other = a.read_bytes()
  a.write_bytes(b.read_bytes())
  b.write_bytes(other)


DAMAGE = {
    'corrupt byte': (corrupt, 'SHA-256'),
    'truncated': (lambda f: first_shard(f).write_bytes(b'1' * 99), '99 bytes'),
    'missing shard': (lambda f: first_shard(f).unlink(), 'missing'),
    'swapped shards': (swap, 'bytes, manifest.json says|SHA-256'),
    'swapped, checksums refreshed': (lambda f: (swap(f), refresh_manifest(f)), 'mixed up'),
    'stray shard': (lambda f: shutil.copy(first_shard(f), f / 'x.safetensors'), 'not listed'),
    'no manifest': (lambda f: (f / 'manifest.json').unlink(), 'experiments.convert'),
    'broken manifest': (lambda f: (f / 'manifest.json').write_text('{'), 'not valid JSON'),
    'future version': (lambda f: edit(f, 'manifest.json', format_version=9), 'format_version 9'),
    'no file list': (lambda f: edit(f, 'manifest.json', files=None), 'lists no files'),
    'path out of the folder': (
        lambda f: edit(
            f, 'manifest.json', files={'../../etc/passwd': {'bytes': 1, 'sha256': 'x'}}
        ), 'missing'
    ),
    'unknown node class': (
        lambda f: edit(f, 'manifest.json', nodes={EXPERTS: {'class': 'Paked', 'static': {}}}),
        'did you mean .Packed',
    ),
    'node fields of another': (
        lambda f: edit(f, 'manifest.json', nodes={EXPERTS: {'class': 'Ternary', 'static': {}}}),
        f'{EXPERTS}.*Ternary',
    ),
    'config with a typo': (
        lambda f: (edit(f, 'config.json', d_modl=3), refresh_manifest(f)), r'd_modl.*d_model'
    ),
    'unknown family': (
        lambda f: (edit(f, 'config.json', family='swich'), refresh_manifest(f)), 'switch'
    ),
    'unknown activation': (
        lambda f: (edit(f, 'config.json', activation='gleu'), refresh_manifest(f)), 'gelu'
    ),
}


@pytest.mark.parametrize('name', DAMAGE)
def test_damage_is_one_line_that_names_the_folder(name, folder):
  damage, message = DAMAGE[name]
  damage(folder)
  with pytest.raises(UserError, match=message) as error:
    store.load_folder(folder)
  assert str(folder) in str(error.value) and '\n' not in str(error.value)


def test_not_a_model_folder(tmp_path):
  (tmp_path / 'file').write_text('x')
  (tmp_path / 'empty').mkdir()
  messages = {'nothing': 'does not exist', 'file': 'not a folder', 'empty': 'has no manifest'}
  for name, message in messages.items():
    with pytest.raises(UserError, match=message):
      store.load_folder(tmp_path / name)


def test_a_folder_is_never_left_half_written(folder, dense, tmp_path):
  before = {p.name: p.read_bytes() for p in folder.iterdir()}

  def leaves():
    yield 'shared/embedding', np.zeros((32, 16), np.float32)
    raise UserError('the source ended early')

  with pytest.raises(UserError, match='ended early'):
    store.save_folder(folder, dataclasses.replace(CONFIG, vocab_size=99), leaves())
  assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
  assert [p.name for p in pathlib.Path(tmp_path).iterdir()] == ['m']


def test_loaded_weights_do_not_lie_in_the_file(dense, tmp_path):
  """Else a file that changes on disk would change a model in memory."""
  store.save_folder(tmp_path / 'm', CONFIG, dense)
  _, params = store.load_folder(tmp_path / 'm')
  file = tmp_path / 'm' / 'model.safetensors'
  patch(file, 0, bytes(file.stat().st_size))
  assert_same(params, dense)
