"""Any one value or byte of a model folder gone wrong: the model is read, or refused in one line."""

import copy
import json
import random

import jax.numpy as jnp
import numpy as np
import pytest

from moejax import files, model, store, tree, weights
from moejax.config import EncDecConfig, EncDecMoeConfig
from moejax.convert import folder as convert
from moejax.errors import UserError

CONFIG = EncDecConfig(
    vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_heads=2, num_layers=2, num_decoder_layers=2,
    moe=EncDecMoeConfig(num_experts=3),
)
GONE = object()
WRONG = (GONE, None, True, 3, -1, 0.5, 'x', [], {}, {'a': 1})


@pytest.fixture(scope='module')
def dense():
  rng = np.random.default_rng(0)
  shapes = tree.flatten(model.abstract_params(CONFIG))
  return tree.unflatten({
      path: jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32))
      for path, leaf in shapes.items()
  })


@pytest.fixture(scope='module')
def ours(dense, tmp_path_factory):
  """A folder of ours in several shards, with one compressed weight."""
  folder = tmp_path_factory.mktemp('ours') / 'm'
  levels = np.full((3, 24), 0.5, np.float32)
  node = weights.Packed.from_symbols(np.ones((3, 24, 16), np.uint8), levels, levels, bits=2)
  params = tree.replace(dense, 'encoder/layers_1/ffn/experts/wi', node)
  store.save_folder(folder, CONFIG, params, provenance={'seed': 7}, shard_bytes=9000)
  return folder


@pytest.fixture(scope='module')
def theirs(dense, tmp_path_factory):
  folder = tmp_path_factory.mktemp('theirs') / 'hf'
  convert.to_hf(model.Model(CONFIG, dense), folder, shard_bytes=9000)
  return folder


def places(value, at=()):
  """Where the values of a JSON object lie; of many like entries the first two."""
  for key in list(value)[: None if at in ((), ('moe',)) else 3]:
    yield (*at, key)
    if isinstance(value[key], dict):
      yield from places(value[key], (*at, key))


def broken(value, at):
  """The object with the value at a place replaced by each wrong one."""
  for wrong in WRONG:
    new = copy.deepcopy(value)
    node = new
    for key in at[:-1]:
      node = node[key]
    if wrong is GONE:
      del node[at[-1]]
    else:
      node[at[-1]] = wrong
    yield new


def read_or_refused(read, folder, what) -> bool:
  """Whether it was refused; another error than a UserError fails the test."""
  try:
    read()
  except UserError as error:
    assert '\n' not in str(error) and str(folder) in str(error), what
    return True
  return False


def read_ours(folder):
  model.check_source(store.Source(folder, verify=True))


@pytest.mark.long(but=(
    'ours-manifest.json-kept0',
    'theirs-config.json-kept2',
    'theirs-model.safetensors.index.json-kept3',
))
@pytest.mark.parametrize('kind, name, kept', [
    ('ours', 'manifest.json', {'format', 'plan', 'provenance', 'seed'}),
    ('ours', 'config.json', set()),
    ('theirs', 'config.json', {'architectures', 'torch_dtype', 'dtype', 'use_cache'}),
    ('theirs', 'model.safetensors.index.json', {'metadata', 'total_size'}),
])
def test_any_one_wrong_value(kind, name, kept, ours, theirs):
  folder, read = (ours, read_ours) if kind == 'ours' else (theirs, convert.HfSource)
  file, manifest = folder / name, folder / 'manifest.json'
  text, listed = file.read_text(), manifest.read_text() if kind == 'ours' else ''
  try:
    for at in places(json.loads(text)):
      refused = 0
      for new in broken(json.loads(text), at):
        file.write_text(json.dumps(new))
        if kind == 'ours' and name != 'manifest.json':
          relist(folder, name)
        refused += read_or_refused(lambda: read(folder), folder, at)
      assert refused > 0 or at[-1] in kept, f'nothing is wrong enough for {at}'
  finally:
    file.write_text(text)
    if kind == 'ours':
      manifest.write_text(listed)
  read(folder)


def relist(folder, name):
  """Makes the manifest agree with a changed file, as a patched tool would."""
  values = json.loads((folder / 'manifest.json').read_text())
  values['files'][name] = {
      'bytes': (folder / name).stat().st_size, 'sha256': files.sha256(folder / name)
  }
  (folder / 'manifest.json').write_text(json.dumps(values))


def test_any_wrong_bytes_in_a_header(theirs):
  random.seed(0)
  file = sorted(theirs.glob('*.safetensors'))[0]
  data = file.read_bytes()
  end, refused = int.from_bytes(data[:8], 'little') + 8, 0
  try:
    for _ in range(400):
      wrong = bytearray(data)
      for _ in range(random.choice([1, 1, 2, 5])):
        wrong[random.randrange(end)] = random.randrange(256)
      if random.random() < 0.2:
        del wrong[random.randrange(len(wrong)):]
      file.write_bytes(wrong)
      refused += read_or_refused(lambda: convert.HfSource(theirs), theirs, 'header')
  finally:
    file.write_bytes(data)
  assert refused > 300


@pytest.mark.torch
@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('zipped', [True, False])
def test_any_wrong_bytes_in_a_torch_file(zipped, theirs, tmp_path):
  import torch
  random.seed(0)
  source = convert.HfSource(theirs)
  names = {n: source._checkpoint.read(n) for n in source._checkpoint.names()}
  (tmp_path / 'config.json').write_bytes((theirs / 'config.json').read_bytes())
  file = tmp_path / 'pytorch_model.bin'
  torch.save(
      {n: torch.tensor(np.array(a)) for n, a in names.items()}, file,
      _use_new_zipfile_serialization=zipped,
  )
  data, refused = file.read_bytes(), 0
  for _ in range(120):
    wrong = bytearray(data)
    for _ in range(random.choice([1, 3, 20])):
      at = random.randrange(3000)
      wrong[random.choice([at, -1 - at])] = random.randrange(256)
    file.write_bytes(wrong)
    refused += read_or_refused(lambda: convert.HfSource(tmp_path), tmp_path, 'torch')
  assert refused > 50
