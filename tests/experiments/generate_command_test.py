"""experiments.generate: streams one prompt, prints several, says in one line what is wrong."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import generate as command
from moejax import compress, convert, weights
from moejax.compress.quantize import quantize
from moejax.config import DecoderConfig, DecoderMoeConfig
from moejax.data import tokenizer
from moejax.errors import UserError
from moejax.generate import generate
from moejax.model import Model

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A random decoder and its tokenizer as a moejax folder, and as a Hugging Face folder."""
  path = tmp_path_factory.mktemp('models')
  config = DecoderConfig(
      family='mixtral', vocab_size=300, d_model=16, d_head=8, d_ff=16, num_heads=2, num_kv_heads=1,
      num_layers=1, max_positions=48, initializer_std=0.5, eos_ids=(1,),
      moe=DecoderMoeConfig(num_experts=2, top_k=2, router='topk', normalize_gates=True),
  )
  model = Model.init(config, jax.random.key(0))
  (path / 'words').mkdir()
  tokenizer.train(['we the people of the union'], 300, 0).save(path / 'words')
  model.save(path / 'ours', tokenizer_from=path / 'words')
  convert.convert_folder(path / 'ours', path / 'theirs')
  return path


def run(*arguments, text=None):
  flags = re.sub(r'--xla_force_host_platform_device_count=\d+', '', os.environ['XLA_FLAGS'])
  return subprocess.run(
      [sys.executable, '-m', 'experiments.generate', *map(str, arguments)], cwd=ROOT, input=text,
      env={**os.environ, 'XLA_FLAGS': flags}, capture_output=True, text=True, errors='replace',
  )


def test_streamed_and_whole_text_are_one_in_both_kinds_of_folder(folder):
  one = run('--model', folder / 'ours', '--prompt', '-', '--max_new_tokens', 9, text='we the')
  assert one.returncode == 0, one.stderr
  assert re.fullmatch(r'\d+ tokens, [\d.]+ a second with compilation', one.stderr.strip())
  both = run(
      '--model', folder / 'theirs', '--prompt', 'we the', '--prompt', 'people of the union',
      '--max_new_tokens', 9, '--json',
  )
  assert both.returncode == 0, both.stderr
  rows = [json.loads(line) for line in both.stdout.splitlines()]
  assert [row['prompt'] for row in rows] == ['we the', 'people of the union']
  assert all(0 < len(row['tokens']) <= 9 for row in rows)
  assert one.stdout.strip() == rows[0]['text'].strip()


@pytest.mark.long(but=("arguments0-model's context of 48", 'arguments4---prompt is missing'))
@pytest.mark.parametrize('arguments, said', [
    (['--prompt', 'we', '--max_new_tokens', '60'], "model's context of 48"),
    (['--prompt', 'we', '--temperature', '-1'], 'temperature = -1.0: at least 0'),
    (['--prompt', 'we', '--stop', 'people of'], "--stop 'people of' is"),
    (['--prompt', ''], '--prompt is empty'),
    ([], '--prompt is missing'),
])
def test_a_mistake_is_one_line(arguments, said, folder):
  done = run('--model', folder / 'ours', *arguments)
  assert done.returncode == 2 and done.stdout == ''
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ') and said in line


def test_ternary_weights_are_the_same_in_every_code(folder):
  model = convert.load(folder / 'ours')
  with pytest.raises(UserError, match='--ternary two_bit: the model has no ternary weights'):
    command.recoded(model, 'two_bit')
  tokens = np.arange(2, 34, dtype=np.int32).reshape(2, 16)
  batches = [{
      'tokens': tokens, 'targets': tokens, 'weights': np.ones((2, 16), np.float32),
      'segments': np.ones((2, 16), np.int32), 'positions': np.tile(np.arange(16), (2, 1)),
  }]
  small = compress.compress(model, quantize(method='rtn', refit=False), batches).model
  prompt, texts = [[5, 7, 9]], {}
  for code, node in (
      ('as_stored', weights.Ternary), ('two_bit', weights.PackedTernary),
      ('sub_bit', weights.BlockTernary),
  ):
    again = command.recoded(small, code)
    assert isinstance(again.params['decoder']['layers_0']['ffn']['experts']['wi'], node)
    texts[code] = np.asarray(generate(again, prompt, max_new_tokens=8).tokens).tolist()
  assert texts['as_stored'] == texts['two_bit'] == texts['sub_bit']
