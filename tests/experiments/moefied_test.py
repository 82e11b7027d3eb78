"""experiments.moefied and experiments.embeddings: their pages, and what is done stays."""

import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import pages
from experiments.embeddings import probe
from experiments.moefied import page
from moejax.config import EncDecConfig, EncoderConfig
from moejax.data import tokenizer as tokenizer_lib
from moejax.errors import UserError
from moejax.model import Model

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
TEXT = 'The state of the union is strong, and the people of this nation are its strength. ' * 200


def run(module, *arguments):
  return subprocess.run(
      [sys.executable, '-m', f'experiments.{module}', *map(str, arguments)], cwd=ROOT,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'}, capture_output=True, text=True, check=False,
  )


@pytest.mark.long
def test_pairs_of_a_dense_model(tmp_path):
  (tmp_path / 'text.txt').write_text(TEXT)
  config = EncDecConfig(
      family='t5', vocab_size=512, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1,
      num_decoder_layers=1, relative_attention_num_buckets=8,
  )
  Model.init(config, jax.random.key(0)).save(tmp_path / 'model')
  tokenizer_lib.train([TEXT], 512).save(tmp_path / 'model')
  arguments = (
      '--model', tmp_path / 'model', '--calibration', tmp_path / 'text.txt', '--test',
      tmp_path / 'text.txt', '--samples', 2, '--test_samples', 2, '--expert_size', 4, '--out',
      tmp_path / 'made.json', '--page', tmp_path / 'page.md',
  )
  (tmp_path / 'page.md').write_text(pages.MARKER + '\nby hand\n')
  done = run(
      'moefied', *arguments, '--pairs', 'random/oracle,random/cosine', '--shares', '0.5,1',
      '--seeds', 0, '--forms', 'plain,fitted',
  )
  assert done.returncode == 0, done.stderr
  made = json.loads((tmp_path / 'made.json').read_text())
  assert len(made['runs']) == 8
  for choice in ('oracle', 'cosine'):
    own = made['runs'][f'random/{choice}/1/plain/0']
    assert own['loss'] == pytest.approx(made['loss'], abs=1e-4) and own['run'] == 1
  assert made['runs']['random/oracle/0.5/plain/0']['run'] == 0.5
  text = (tmp_path / 'page.md').read_text()
  assert page.table(made, 'fitted') in text and text.endswith('by hand\n')
  assert (tmp_path / 'made.png').read_bytes().startswith(b'\x89PNG')
  before = dict(made['runs'])
  done = run('moefied', *arguments, '--pairs', 'random/random', '--shares', '0.5', '--seeds', 1)
  assert done.returncode == 0, done.stderr
  made = json.loads((tmp_path / 'made.json').read_text())
  assert len(made['runs']) == 10 and before.items() <= made['runs'].items()
  for pairs, words in (('random/orakle', "did you mean 'oracle'"), ('random', 'split/choice')):
    done = run('moefied', *arguments, '--pairs', pairs)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_page_says_where_the_order_is_another():
  runs = {
      f'clusters/{choice}/0.2/plain/{seed}': {'loss': loss + seed}
      for choice, loss in (('oracle', 1.0), ('mlp', 1.2), ('cosine', 1.1), ('random', 2.0))
      for seed in (0, 1)
  }
  wrong, places = page.ordering({'runs': runs})
  assert places == 1 and wrong == [
      'clusters at 20%, as they are: mlp 1.700, cosine 1.600']
  assert page.best({'runs': runs}, 'plain', '0.2', 2) == ['clusters/cosine', 'clusters/mlp']
  assert page.needed({'0.1': [2.0], '0.5': [1.004, 1.012]}, 1.0) == '50%'
  assert page.needed({'0.1': [2.0]}, 1.0) == 'more'


def test_probes():
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(3, 8))
  labels, other = rng.integers(0, 3, 60), rng.integers(0, 3, 40)
  draw = lambda own: (centres[own] + 0.1 * rng.normal(size=(len(own), 8))).astype(np.float32)
  assert probe.accuracy(draw(labels), labels, draw(other), other) == 1.0
  assert probe.accuracy(draw(labels), rng.permutation(labels), draw(other), other) < 0.8
  x = rng.normal(size=(5, 4)).astype(np.float32)
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  assert probe.fidelity(x, x) == pytest.approx(1) and probe.fidelity(x, -x) == pytest.approx(-1)


@pytest.mark.long
def test_embeddings_of_an_encoder(tmp_path):
  words = {'a': 'war and peace in the north', 'b': 'the market fell by a tenth'}
  for name in ('bbc', 'r8'):
    for part in ('train', 'test'):
      for label, text in words.items():
        place = tmp_path / name / part / label
        place.mkdir(parents=True)
        for i in range(8):
          (place / f'{i}.txt').write_text(f'{text} {i} ' * 3)
  tokenizer = tokenizer_lib.train([' '.join(words.values()) * 50], 300, 0)
  config = EncoderConfig(
      vocab_size=300, d_model=16, d_head=8, d_ff=32, num_heads=2, num_kv_heads=2, num_layers=1,
      max_positions=32, head='none', pooler=True, initializer_std=0.3,
  )
  model = Model.init(config, jax.random.key(0))
  for name, activation in (('gelu', 'gelu'), ('relu', 'relu')):
    made = Model(EncoderConfig(**{**vars(config), 'activation': activation}), model.params)
    made.save(tmp_path / name)
    tokenizer.save(tmp_path / name)
  arguments = (
      '--model', tmp_path / 'relu', '--reference', tmp_path / 'gelu', '--texts', tmp_path,
      '--length', 16, '--train', 16, '--test', 16, '--samples', 8, '--expert_size', 4,
      '--out', tmp_path / 'made.json', '--page', tmp_path / 'page.md',
  )
  done = run(
      'embeddings', *arguments, '--pairs', 'clusters/oracle', '--shares', '0.5,1', '--seeds', 0
  )
  assert done.returncode == 0, done.stderr
  made = json.loads((tmp_path / 'made.json').read_text())
  models, runs = made['models'], made['runs']
  assert models['original']['bbc_cosine'] == pytest.approx(1, abs=1e-4)
  assert models['trained'] == models['swapped'] and models['teal']['r8_cosine'] < 1
  whole = runs['clusters/oracle/1/plain/0']
  assert whole['bbc_cosine'] == pytest.approx(models['trained']['bbc_cosine'], abs=2e-4)
  assert runs['clusters/oracle/0.5/plain/0']['r8_cosine'] != whole['r8_cosine']
  text = (tmp_path / 'page.md').read_text()
  assert 'ReLU, trained on hidden states' in text
  assert (tmp_path / 'made.png').read_bytes().startswith(b'\x89PNG')
  with pytest.raises(UserError, match='at least two'):
    (tmp_path / 'one' / 'a').mkdir(parents=True)
    probe.read(tmp_path / 'one', tokenizer, 16, 4)
