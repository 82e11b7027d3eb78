"""experiments.adaptive: both pairs and the ensemble on tiny models, and its page."""

import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import pytest

from moejax.config import EncDecConfig, EncDecMoeConfig
from moejax.data import tokenizer as tokenizer_lib
from moejax.model import Model

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
TEXT = 'The state of the union is strong, and the people of this nation are its strength. ' * 400


def run(*arguments):
  return subprocess.run(
      [sys.executable, '-m', 'experiments.adaptive', *map(str, arguments)], cwd=ROOT,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'}, capture_output=True, text=True, check=False,
  )


@pytest.mark.long
def test_small_models(tmp_path):
  (tmp_path / 'text.txt').write_text(TEXT)
  shape = dict(
      vocab_size=512, d_model=32, d_kv=8, d_ff=64, num_heads=2, num_layers=2, dropout_rate=0.0,
      num_decoder_layers=2, relative_attention_num_buckets=8,
  )
  models = {
      'sparse': EncDecConfig(moe=EncDecMoeConfig(num_experts=4), **shape),
      'dense': EncDecConfig(family='t5', **shape),
  }
  for name, config in models.items():
    Model.init(config, jax.random.key(0)).save(tmp_path / name)
    tokenizer_lib.train([TEXT], 512).save(tmp_path / name)
  arguments = (
      '--calibration', tmp_path / 'text.txt', '--test', tmp_path / 'text.txt', '--samples', 4,
      '--test_samples', 16, '--steps', 2, '--share', 0.5, '--out', tmp_path / 'made.json',
      '--page', tmp_path / 'page.md',
  )
  done = run('--sparse', tmp_path / 'sparse', '--dense', tmp_path / 'dense', *arguments)
  assert done.returncode == 0, done.stderr
  made = json.loads((tmp_path / 'made.json').read_text())
  for own in made['ari'].values():
    rows = list(own['rows'].values())
    assert 0 < own['cost'] < 1 and own['texts'] >= 6
    for row in rows:
      assert row['saved'] == pytest.approx(1 - own['cost'] - row['rerun'])
      assert row['agreement'] >= 1 - row['changed'] - 1e-9
    assert [r['rerun'] for r in rows] == sorted((r['rerun'] for r in rows), reverse=True)
  assert set(made['ensemble']) == {'before', 'trained as it is', 'trained in two'}
  losses = made['ensemble']['before']
  assert losses['1'] != losses['2'] != losses['4']
  assert 'Ternary experts' in (tmp_path / 'page.md').read_text()
  done = run('--sparse', tmp_path / 'dense', '--dense', tmp_path / 'dense', *arguments)
  assert done.returncode == 2 and 'no such model' in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1
