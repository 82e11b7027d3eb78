"""experiments.fewer: tables and pictures of a model cut by two methods; what is done stays."""

import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import pages
from experiments.fewer import labelled, page, problems
from moejax.config import DecoderConfig, EncDecConfig, EncDecMoeConfig
from moejax.data import tokenizer as tokenizer_lib
from moejax.model import Model

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
TEXT = 'The state of the union is strong, and the people of this nation are its strength. ' * 200


def run(*arguments):
  return subprocess.run(
      [sys.executable, '-m', 'experiments.fewer', *map(str, arguments)], cwd=ROOT,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'}, capture_output=True, text=True, check=False,
  )


@pytest.mark.long
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
  done_before = {'loss': 9.25, 'expert_bytes': 1, 'stored_bytes': 2, 'seconds': 3, 'layers': []}
  (tmp_path / 'fewer.json').write_text(json.dumps({
      'machine': {'cpu': 'some', 'cores': 2}, 'jax': '0', 'model': str(tmp_path / 'model'),
      'samples': 2, 'tests': 2, 'calibration': [str(tmp_path / 'text.txt')],
      'test': [str(tmp_path / 'text.txt')],
      'how': {'steps': 2, 'size': 8, 'learning_rate': 1e-4, 'task': ''}, 'before': {},
      'runs': {'prune reap/2/0': done_before},
  }))
  (tmp_path / 'page.md').write_text(pages.MARKER + '\nby hand\n')
  done = run(*arguments, '--methods', 'prune reap,merge hc_smoe', '--seeds', '0')
  assert done.returncode == 0, done.stderr
  both = json.loads((tmp_path / 'fewer.json').read_text())
  assert set(both['runs']) == {'prune reap/2/0', 'merge hc_smoe/2/0'}
  assert both['runs']['prune reap/2/0'] == done_before
  assert both['runs']['merge hc_smoe/2/0']['expert_bytes'] * 2 == both['before']['expert_bytes']
  text = (tmp_path / 'page.md').read_text()
  assert page.table(both) in text
  assert text.endswith('by hand\n')
  for name in ('fewer', 'fewer_map', 'fewer_trees'):
    assert (tmp_path / f'{name}.png').read_bytes().startswith(b'\x89PNG')
    assert f'{name}.png' in text
  done = run(*arguments, '--methods', 'merge random', '--recover', 4)
  assert done.returncode == 2 and 'holds runs with other settings' in done.stderr
  assert problems.drawn(1000, 20, 1) != problems.drawn(1000, 20, 0)
  done = run(*arguments, '--methods', 'prune reep')
  assert done.returncode == 2 and "did you mean 'prune reap'" in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.long
def test_a_task_and_recovery(tmp_path):
  """Labels that a word gives away are learnt; a cut model trains back towards the model before."""
  tokenizer = tokenizer_lib.train([TEXT + 'war peace ' * 50], 512)
  config = EncDecConfig(
      vocab_size=512, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2, dropout_rate=0.0,
      num_decoder_layers=2, relative_attention_num_buckets=8, moe=EncDecMoeConfig(num_experts=4),
  )
  Model.init(config, jax.random.key(0)).save(tmp_path / 'model')
  tokenizer.save(tmp_path / 'model')
  for label in ('war', 'peace'):
    (tmp_path / 'texts' / label).mkdir(parents=True)
    for i in range(20):
      (tmp_path / 'texts' / label / f'{i}.txt').write_text(f'{label} ' * (3 + i % 4) + f'year {i}')
    (tmp_path / 'texts' / label / 'again.txt').write_text(f'{label} ' * 3 + 'year 0')
  train, test = labelled.samples(tmp_path / 'texts', config, tokenizer, 32)
  assert (len(train), len(test)) == (32, 8)
  assert {int(s['targets'][0, 0]) for s in train} == {3, 4}
  decoder = DecoderConfig(
      family='mixtral', vocab_size=512, d_model=8, d_head=4, d_ff=8, num_heads=2, num_kv_heads=2,
      num_layers=1, eos_ids=(1,),
  )
  row = labelled.samples(tmp_path / 'texts', decoder, tokenizer, 32)[0][0]
  (place,) = np.flatnonzero(row['weights'][0])
  assert row['tokens'][0, place] == 1 and row['targets'][0, place] in (3, 4)
  assert row['positions'][0, place] == place == row['segments'].sum() - 1
  assert not row['tokens'][0, place + 1 :].any()
  done = run(
      '--model', tmp_path / 'model', '--task', tmp_path / 'texts', '--tuned', tmp_path / 'tuned',
      '--task_steps', 60, '--recover', 16, '--batch', 8, '--learning_rate', 0.003, '--samples', 8,
      '--counts', '2', '--seeds', '0', '--methods', 'prune random', '--out', tmp_path / 'f.json',
      '--page', tmp_path / 'page.md',
  )
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / 'f.json').read_text())
  row = result['runs']['prune random/2/0']
  assert result['before']['accuracy'] > 0.9
  assert row['recovered'] < row['loss'] and 0 <= row['accuracy'] <= 1
  text = (tmp_path / 'page.md').read_text()
  assert all(page.table(result, kind) in text for kind in page.KINDS)
  done = run(
      '--model', tmp_path / 'model', '--task', tmp_path / 'texts', '--tuned', tmp_path / 'tuned',
      '--task_steps', 30, '--out', tmp_path / 'other.json',
  )
  assert done.returncode == 2 and "'steps': 60" in done.stderr and '--tuned' in done.stderr
