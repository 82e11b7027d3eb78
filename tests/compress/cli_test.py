"""python -m experiments.compress: a run on text, overrides, and bad input in one line."""

import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import pytest

from experiments import flags
import moejax
from moejax import compress, weights
from moejax.config import EncDecConfig, EncDecMoeConfig
from moejax.data import tokenizer as tokenizer_lib
from moejax.errors import UserError
from moejax.model import Model

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
TEXT = 'The state of the union is strong, and the people of this nation are its strength. ' * 60


def run(*arguments):
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  return subprocess.run(
      [sys.executable, '-m', 'experiments.compress', *map(str, arguments)], cwd=ROOT, env=env,
      capture_output=True, text=True, check=False,
  )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp('cli')
  (root / 'text.txt').write_text(TEXT)
  (root / 'short.txt').write_text(TEXT[:200])
  (root / 'empty.txt').write_text('')
  (root / 'binary.txt').write_bytes(bytes(range(256)))
  tokenizer = tokenizer_lib.train([TEXT], 512)
  config = EncDecConfig(
      vocab_size=512, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2,
      num_decoder_layers=2, relative_attention_num_buckets=8, moe=EncDecMoeConfig(num_experts=4),
  )
  Model.init(config, jax.random.key(0)).save(root / 'model')
  tokenizer.save(root / 'model')
  return root


def test_compress_text(folder):
  done = run(
      '--config', 'configs/qmoe.py:two_bit', '--model', folder / 'model', '--calibration',
      folder / 'text.txt', '--validation', folder / 'text.txt', '--out', folder / 'out',
      '--samples', 4, '--set', 'layers=decoder/.*',
  )
  assert done.returncode == 0, done.stderr
  summary = json.loads(done.stdout)
  assert summary['matrices'] == 8 and summary['loss'] > 0
  experts = Model.load(folder / 'out').params
  assert isinstance(experts['decoder']['layers_1']['ffn']['experts']['wi'], weights.Packed)
  assert not isinstance(experts['encoder']['layers_1']['ffn']['experts']['wi'], weights.Packed)


@pytest.mark.long
def test_prune_and_merge_text(folder):
  common = ('--model', folder / 'model', '--calibration', folder / 'text.txt', '--samples', 4,
            '--statistics', folder / 'statistics.npz')
  done = run('--config', 'configs/prune.py', *common, '--out', folder / 'pruned')
  assert done.returncode == 0, done.stderr
  assert Model.load(folder / 'pruned').config.moe.num_experts == 2
  sizes = json.loads(done.stdout)
  assert sizes['after']['expert_bytes'] == sizes['before']['expert_bytes'] / 2
  assert '2 of 4 experts stayed' in Path(sizes['page']).read_text()
  measured = (folder / 'statistics.npz').read_bytes()
  done = run(
      '--config', 'configs/merge.py', *common, '--out', folder / 'merged', '--set', 'experts=3',
      '--set', 'budget=uniform',
  )
  assert done.returncode == 0, done.stderr
  assert Model.load(folder / 'merged').config.moe.layer_experts == (3, 3)
  assert (folder / 'statistics.npz').read_bytes() == measured
  assert not list(folder.glob('.statistics*'))
  before = sorted(folder.iterdir())
  done = run('--config', 'configs/merge.py:hc_smoe', *common, '--out', folder / 'bad')
  assert done.returncode == 2, done.stderr
  assert "needs statistics of kind ['all_outputs']" in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1
  assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize('config, message', (
    ('prune.py:reep', "did you mean 'reap'"), ('merge.py:hc', "has no variant 'hc'"),
))
def test_an_unknown_variant(config, message, monkeypatch):
  monkeypatch.chdir(ROOT)
  with pytest.raises(UserError, match=message):
    flags.load_config(f'configs/{config}', [])


def test_fields_of_merging_and_pruning_can_be_set(monkeypatch):
  monkeypatch.chdir(ROOT)
  made = flags.load_config('configs/merge.py', ['experts=8', 'layers=decoder/.*'])
  assert (made.experts, made.layers) == (8.0, 'decoder/.*')
  made = flags.load_config('configs/prune.py:ean', ['layer_experts=[4,8]'])
  assert made.layer_experts == (4, 8)
  with pytest.raises(UserError, match='did you mean'):
    flags.load_config('configs/prune.py', ['expert=2'])


@pytest.mark.long(but=('None',))
@pytest.mark.parametrize('model', ['switch-c-2048', None])
def test_dry_run_writes_nothing(folder, model):
  before = sorted(folder.rglob('*'))
  done = run(
      '--config', 'configs/qmoe.py', '--model', model or folder / 'model', '--dry_run',
      '--out', folder / 'dry', '--zero_share', 0.885,
  )
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout)
  size = result['after']['stored_bytes']
  named = moejax.preset(model) if model else folder / 'model'
  expected = compress.dry_run(named, moejax.quantize(), zero_share=0.885)
  assert result == {**expected, 'zero_share': 0.885}
  assert sum(result['after']['bytes_by_part'].values()) == size
  assert {row['form'] for row in result['layers']} == {'Ternary'}
  assert any(x.startswith('experts') and 'B' in x for x in done.stderr.splitlines())
  assert sorted(folder.rglob('*')) == before


def test_dry_run_of_an_unknown_model(folder):
  done = run('--config', 'configs/qmoe.py', '--model', 'switch-c-2408', '--dry_run')
  assert done.returncode == 2 and "did you mean 'switch-c-2048'" in done.stderr


@pytest.mark.long(but=(
    'change7-binary.txt is a binary file',
    "change8-unknown flag --calibation (did you mean 'calibration'?)",
))
@pytest.mark.parametrize('change,message', [
    ({'--config': 'configs/qmoe.py:ternry'}, "did you mean 'ternary'"),
    ({'--set': 'matrix.dampin=1'}, "did you mean 'damping'"),
    ({'--model': 'nowhere'}, 'does not exist'),
    ({'--calibration': None}, '--calibration is missing'),
    ({'--calibration': '{}/short.txt'}, ' tokens; one sample has 568: give a longer text'),
    ({'--validation': '{}/short.txt'}, '--validation: a text of'),
    ({'--calibration': '{}/empty.txt'}, 'empty.txt is empty'),
    ({'--calibration': '{}/binary.txt'}, 'binary.txt is a binary file'),
    ({'--calibation': 'x'}, "unknown flag --calibation (did you mean 'calibration'?)"),
    ({'--out': '{}/text.txt'}, 'text.txt is a file: name a folder'),
    ({'--out': '{}'}, "holds 'binary.txt', which is no part of a model folder"),
])
def test_bad_input(folder, change, message):
  change = {k: v and v.format(folder) for k, v in change.items()}
  arguments = {
      '--config': 'configs/qmoe.py', '--model': folder / 'model',
      '--calibration': folder / 'text.txt', '--out': folder / 'bad',
  } | change
  done = run(*(x for k, v in arguments.items() if v is not None for x in (k, v)))
  assert done.returncode == 2
  assert done.stderr.startswith('error: ') and message in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1
  assert not (folder / 'bad').exists()
