"""experiments.fewer: tables and pictures of a model cut by two methods; what is done stays."""

import json
import os
from pathlib import Path
import subprocess
import sys

import jax

from experiments.fewer import page
from moejax.config import EncDecConfig, EncDecMoeConfig
from moejax.data import tokenizer as tokenizer_lib
from moejax.model import Model

ROOT = Path(__file__).parents[2]
TEXT = 'The state of the union is strong, and the people of this nation are its strength. ' * 200


def run(*arguments):
  return subprocess.run(
      [sys.executable, '-m', 'experiments.fewer', *map(str, arguments)], cwd=ROOT,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'}, capture_output=True, text=True, check=False,
  )


def test_two_methods(tmp_path):
  (tmp_path / 'text.txt').write_text(TEXT)
  tokenizer = tokenizer_lib.train([TEXT], 512)
  config = EncDecConfig(
      vocab_size=512, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2,
      num_decoder_layers=2, relative_attention_num_buckets=8, moe=EncDecMoeConfig(num_experts=4),
  )
  Model.init(config, jax.random.key(0)).save(tmp_path / 'model')
  tokenizer.save(tmp_path / 'model')
  arguments = (
      '--model', tmp_path / 'model', '--calibration', tmp_path / 'text.txt',
      '--test', tmp_path / 'text.txt', '--samples', 2, '--test_samples', 2, '--counts', '2',
      '--out', tmp_path / 'fewer.json', '--page', tmp_path / 'page.md',
  )
  done = run(*arguments, '--methods', 'prune reap', '--seeds', '0')
  assert done.returncode == 0, done.stderr
  first = json.loads((tmp_path / 'fewer.json').read_text())
  assert list(first['runs']) == ['prune reap/2/0']
  assert first['runs']['prune reap/2/0']['expert_bytes'] == first['before']['expert_bytes'] / 2
  (tmp_path / 'page.md').write_text((tmp_path / 'page.md').read_text() + 'by hand\n')
  recover = ('--recover', 8, '--batch', 2)
  done = run(*arguments, '--methods', 'prune reap,merge hc_smoe', '--seeds', '0', *recover)
  assert done.returncode == 0, done.stderr
  both = json.loads((tmp_path / 'fewer.json').read_text())
  assert set(both['runs']) == {'prune reap/2/0', 'merge hc_smoe/2/0'}
  for name, value in first['runs']['prune reap/2/0'].items():
    assert name == 'seconds' or both['runs']['prune reap/2/0'][name] == value, name
  for row in both['runs'].values():
    assert row['recovered'] < row['loss']
  text = (tmp_path / 'page.md').read_text()
  assert page.table(both) in text and page.table(both, 'recovered') in text
  assert text.endswith('by hand\n')
  for name in ('fewer', 'fewer_map', 'fewer_trees'):
    assert (tmp_path / f'{name}.png').read_bytes().startswith(b'\x89PNG')
    assert f'{name}.png' in text
  done = run(*arguments, '--methods', 'merge random', '--recover', 4)
  assert done.returncode == 2 and 'holds runs of --recover 8 --batch 2' in done.stderr
  done = run(*arguments, '--methods', 'prune reep')
  assert done.returncode == 2 and "did you mean 'prune reap'" in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1
