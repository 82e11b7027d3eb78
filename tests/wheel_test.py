"""The wheel holds moejax and kernels_pallas alone, and works without the repository."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """Built from a copy of the tree, since building writes beside its sources."""
  folder = tmp_path_factory.mktemp('wheel')
  for name in ('moejax', 'kernels_pallas', 'configs', 'experiments', 'tests'):
    ignored = shutil.ignore_patterns('__pycache__', '*.safetensors', '*.npz', '*.xz', '*.so')
    shutil.copytree(ROOT / name, folder / 'tree' / name, ignore=ignored)
  for name in ('pyproject.toml', 'setup.py', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, folder / 'tree')
  done = subprocess.run(
      [sys.executable, '-m', 'pip', 'wheel', '.', '--no-deps', '--no-build-isolation', '--no-index',
       '-q', '-w', str(folder)],
      cwd=folder / 'tree', capture_output=True, text=True,
  )
  assert done.returncode == 0, done.stderr
  (built,) = folder.glob('*.whl')
  return built


def sources(name):
  return {str(p.relative_to(ROOT)) for p in (ROOT / name).rglob('*.py')}


def test_it_holds_the_library_and_nothing_else(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
  assert {name.split('/')[0] for name in names if '.dist-info/' not in name} == {
      'moejax', 'kernels_pallas'
  }
  assert {n for n in names if n.endswith('.py')} == sources('moejax') | sources('kernels_pallas')
  # What the code reads beside itself comes along.
  data = {
      str(p.relative_to(ROOT))
      for top in ('moejax', 'kernels_pallas') for p in (ROOT / top).rglob('*')
      if p.is_file() and p.suffix not in ('.py', '.pyc', '.cc', '.h', '.so')
  }
  assert data and data <= names
  assert any(name.endswith('/licenses/LICENSE') for name in names)
  compiled = [name for name in names if name.endswith('.so')]
  assert len(compiled) == bool(shutil.which('c++')), compiled


AWAY = '''
import importlib.resources
import sys

# The training extras are optional: nothing of the public API may need them.
for extra in ('datasets', 'tokenizers', 'tensorboardX', 'matplotlib', 'torch', 'transformers'):
  sys.modules[extra] = None

import moejax

assert moejax.__file__.startswith(sys.argv[1]), moejax.__file__
for heavy in ('jax', 'flax', 'numpy', 'optax', 'orbax', 'absl'):
  assert heavy not in sys.modules, heavy
for name in moejax.__all__:
  getattr(moejax, name)

import jax
import numpy as np
from moejax.compress import compress
import moejax.report
import kernels_pallas.codeword_matmul.api

assert 'font' in importlib.resources.files('moejax.report').joinpath('style.css').read_text()
config = moejax.EncDecConfig(
    vocab_size=150, d_model=4, d_kv=2, d_ff=4, num_heads=2, num_layers=2, num_decoder_layers=1,
    moe=moejax.EncDecMoeConfig(num_experts=2, decoder_sparse_step=0),
)
model = moejax.Model.init(config, jax.random.key(0))
tokens = np.arange(3, 15, dtype=np.int32)[None]
batch = {'encoder_tokens': tokens, 'decoder_tokens': tokens, 'targets': tokens,
         'weights': np.ones((1, 12), np.float32)}
small = compress(model, moejax.quantize('ternary'), [batch]).model
small.save('small')
assert moejax.Model.load('small').apply(tokens, tokens).logits_btv.shape == (1, 12, 150)
print('fine')
'''


@pytest.mark.long
def test_it_works_away_from_the_repository(wheel, tmp_path):
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(tmp_path / 'site')
  env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'XLA_FLAGS')}
  env |= {'PYTHONPATH': str(tmp_path / 'site'), 'JAX_PLATFORMS': 'cpu', 'PYTHONSAFEPATH': '1'}
  done = subprocess.run(
      [sys.executable, '-c', AWAY, str(tmp_path / 'site')], cwd=tmp_path, env=env,
      capture_output=True, text=True,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == 'fine\n'
