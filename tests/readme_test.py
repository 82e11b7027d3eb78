"""What README.md shows is what happens: its Python runs, its commands and its table are true."""

import os
import pathlib
import re
import resource
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest

import moejax
from moejax import compress

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def blocks(language: str) -> list[str]:
  """The contents of the fenced blocks of a language."""
  parts = re.split(r'^```', README, flags=re.M)[1::2]
  return [part.partition('\n')[2] for part in parts if part.partition('\n')[0] == language]


def commands() -> list[str]:
  """The lines of the block of commands."""
  (block,) = [b for b in blocks('') if '-m experiments.train' in b]
  return block.strip().splitlines()


def run(*arguments: str) -> subprocess.CompletedProcess:
  flags = re.sub(r'--xla_force_host_platform_device_count=\d+', '', os.environ['XLA_FLAGS'])
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags, 'PYTHONPATH': ''}
  return subprocess.run(
      [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
  )


def arrays(config) -> dict[str, np.ndarray]:
  """What the block takes for granted: tokens, a batch, a layer's weights and Hessians."""
  rng = np.random.default_rng(0)
  tokens = lambda length: rng.integers(3, config.vocab_size - 100, (4, length)).astype(np.int32)
  inputs = rng.normal(size=(4, 64, 16)).astype(np.float32)
  x, y, z = tokens(24), tokens(9), tokens(9)
  return {
      'x': x, 'y': y, 'z': z, 'w': np.ones((4, 9), np.float32), 'encoder_tokens': x, 'tokens': x,
      'decoder_tokens': y, 'w_edf': rng.normal(size=(4, 16, 24)).astype(np.float32),
      'h_edd': np.einsum('emd,emc->edc', inputs, inputs),
  }


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
  config = moejax.EncDecConfig(
      vocab_size=256, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2, num_decoder_layers=2,
      moe=moejax.EncDecMoeConfig(num_experts=4, expert_capacity=64),
  )
  monkeypatch.chdir(tmp_path)
  moejax.to_hf(moejax.Model.init(config, jax.random.key(0)), 'google-switch-base-8')
  code, of_dense = blocks('python')
  assert len([line for line in code.splitlines() if line and not line.startswith('#')]) <= 16
  names = arrays(config)
  exec(compile(code, 'README.md', 'exec'), names)
  assert names['out'].logits_btv.shape == (4, 9, 256)
  experts = names['small'].params['encoder']['layers_1']['ffn']['experts']
  assert isinstance(experts['wi'], moejax.Ternary)
  assert names['symbols'].shape == (4, 16, 24)
  assert (tmp_path / 'switch-base-8-ternary' / 'manifest.json').is_file()
  assert moejax.from_hf('for-transformers').config == names['small'].config
  bert = moejax.EncoderConfig(
      vocab_size=256, d_model=16, d_head=8, d_ff=320, num_heads=2, num_kv_heads=2, num_layers=2,
      head='none', pooler=True,
  )
  moejax.to_hf(moejax.Model.init(bert, jax.random.key(0)), 'minilm')
  exec(compile(of_dense, 'README.md', 'exec'), names)
  split = names['split'].config
  assert split.moe.selection.choices == (2,) and len(split.cuts.hidden_cut) == 2


@pytest.mark.long(but=(
    'experiments.train', 'experiments.compress', 'experiments.bench', 'experiments.pods',
))
@pytest.mark.parametrize('command', commands(), ids=lambda c: c.split()[2])
def test_the_commands_of_the_readme_have_these_flags(command):
  python, _, module, *_ = command.split()
  assert python == 'python' and module.startswith('experiments.')
  help_text = run('-m', module, '--help').stdout
  flags = re.findall(r'--(\w+)', command)
  assert flags and not [f for f in flags if not re.search(rf'--(\[no\])?{f}\b', help_text)]
  assert f'python -m {module}' in help_text, 'no example'


@pytest.mark.long
def test_the_sizes_of_the_readme_are_what_its_command_prints():
  (command,) = re.findall(r'`(python -c "[^`]*)`', README)
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  done = run(*shlex.split(command)[1:])
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  assert done.returncode == 0, done.stderr
  assert after.ru_utime - before.ru_utime < 60  # shapes only, of a model of 1.6 trillion weights
  printed = {row.split('|')[1].strip(): row.split('|') for row in done.stdout.splitlines()[2:]}
  shown = [row.strip('|').split('|') for row in README.splitlines() if row.startswith('| switch-')]
  assert len(shown) == len(printed) == 3
  for name, *cells in shown:
    for cell, place in zip(cells, (5, 6, 7), strict=True):
      for number, exact in zip(numbers(cell), numbers(printed[name.strip()][place])):
        decimals = len(number.partition('.')[2])
        assert f'{float(exact):.{decimals}f}' == number, (name, cell)


def test_the_sizes_of_fewer_experts_are_those_of_a_dry_run():
  config, layers = moejax.preset('switch-base-32'), '(?!encoder/layers_1/).*'
  merge = moejax.merge(8, budget='uniform', layers=layers)
  low, ternary = moejax.decompose(32, layers=layers), moejax.quantize('ternary')
  wanted = [
      compress.dry_run(config, merge)['before'],
      *(compress.dry_run(config, moejax.chain(*steps))['after'] for steps in (
          (merge,), (merge, low), (merge, ternary), (merge, low, ternary),
      )),
  ]
  rows = README.partition('| of switch-base-32')[2].splitlines()[2:7]
  for row, want in zip(rows, wanted, strict=True):
    shown = [float(numbers(cell)[0]) for cell in row.strip('|').split('|')[1:]]
    exact = want['parameters'] / 1e6, want['stored_bytes'] / 1e9, want['expert_bytes'] / 1e9
    assert shown == [round(exact[0], 1), *(round(x, 3) for x in exact[1:])], row


def numbers(cell: str) -> list[str]:
  return re.findall(r'\d+(?:\.\d+)?', cell.replace(',', ''))


def test_the_files_that_the_readme_names_exist():
  named = re.findall(r'\]\(([^)#]+)\)', README)
  named += re.findall(r'`((?:experiments|configs)/[^`*]+)`', README)
  assert named
  assert not [name for name in named if '://' not in name and not (ROOT / name).exists()]
