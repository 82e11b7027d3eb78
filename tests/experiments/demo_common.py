"""A stand-in checkpoint: random weights of the demo's kind, small enough for seconds."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np

from moejax import config as config_lib
from moejax import model, store, tree
from moejax.data import tokenizer as tokenizer_lib

ROOT = pathlib.Path(__file__).parent.parent.parent
WORDS = str.split(
    'the people of these states shall hold that peace and law are one with their government while '
    'congress may ask for more money than any treasury has ever had to give'
)
VOCAB = 400


def environment() -> dict[str, str]:
  """One device for processes of their own."""
  flags = re.sub(r'--xla_force_host_platform_device_count=\d+', '', os.environ['XLA_FLAGS'])
  return {
      **os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu',
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }


def speech(seed: int, words: int = 900) -> str:
  """Made-up prose."""
  rng = np.random.default_rng(seed)
  picked = rng.choice(WORDS, words, p=np.arange(1, len(WORDS) + 1) / sum(range(len(WORDS) + 1)))
  return ' '.join(picked) + '.\n'


def make_checkpoint(folder: pathlib.Path) -> dict[str, str]:
  """Writes texts and a model of four experts a layer; returns the demo's flags for them."""
  for name, seed in (('train1', 0), ('train2', 1), ('test', 2)):
    (folder / f'{name}.txt').write_text(speech(seed))
  texts = [(folder / f'train{i}.txt').read_text() for i in (1, 2)]
  tokenizer = tokenizer_lib.train(texts, VOCAB, num_sentinels=20)
  (folder / 'tokenizer').mkdir()
  tokenizer.save(folder / 'tokenizer')
  config = config_lib.EncDecConfig(
      vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1,
      num_decoder_layers=1, dropout_rate=0.0, tie_embeddings=False,
      moe=config_lib.EncDecMoeConfig(
          num_experts=4, encoder_sparse_step=1, decoder_sparse_step=1,
          router_ignore_padding_tokens=True,
      ),
  )
  rng = np.random.default_rng(0)

  def fill(path, leaf):
    if path.endswith('norm'):
      return np.ones(leaf.shape, leaf.dtype)
    scale = 1.0 if 'embedding' in path else leaf.shape[-2] ** -0.5
    return (rng.normal(size=leaf.shape) * scale).astype(leaf.dtype)

  params = tree.map_paths(fill, model.abstract_params(config, jax.numpy.bfloat16))
  data = config_lib.DataConfig(encoder_length=32, num_sentinels=20)
  store.save_folder(
      folder / 'checkpoint', config, params, tokenizer_from=folder / 'tokenizer',
      provenance={'trained': {'experiment': {'data': config_lib.to_json(data)}}},
  )
  return {
      'checkpoint': str(folder / 'checkpoint'), 'train_files': str(folder / 'train*.txt'),
      'test_files': str(folder / 'test.txt'), 'train_seconds': '0.2',
      'calibration_samples': '24', 'test_batches': '1',
  }


def full_disk(kilobytes: int, command: list[str]) -> list[str]:
  """The command where no file can grow past a size: its writes fail as on a full disk."""
  return ['bash', '-c', f'ulimit -f {kilobytes}; exec "$@"', 'bash', *command]


def run(module: str, room: int | None = None, **flags: str) -> subprocess.CompletedProcess:
  """Runs an experiments main to its end; `room`: see `full_disk`."""
  given = [f'--{name}={value}' for name, value in flags.items()]
  command = [sys.executable, '-m', f'experiments.{module}', *given]
  if room is not None:
    command = full_disk(room, command)
  return subprocess.run(
      command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
  )


def read(path: pathlib.Path) -> dict:
  return json.loads(path.read_text())
