"""Peak resident memory of conversion on a 500 MB model, each way in a process of its own."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from moejax import files, safetensors_io
from moejax.config import EncDecConfig, EncDecMoeConfig
from moejax.convert import folder as convert
from moejax.convert import switch

ROOT = pathlib.Path(__file__).parent.parent.parent
MB = 1 << 20
CONFIG = EncDecConfig(
    vocab_size=512, d_model=512, d_kv=16, d_ff=2048, num_heads=4, num_layers=2,
    num_decoder_layers=2,
    moe=EncDecMoeConfig(num_experts=16, encoder_sparse_step=1, decoder_sparse_step=1),
)
STACK = 16 * 512 * 2048 * 4  # the largest leaf: 64 MiB
# The interpreter's and allocators' own coming and going.
SLACK = 24 * MB


def write_source(folder, config, torch_file=False):
  """A model of this size whose tensors are slices of one noise, so that making it is quick."""
  folder.mkdir()
  values = {**switch.write_config(config), 'model_type': switch.FAMILY.model_types[0]}
  files.write_json(folder / 'config.json', values)
  noise = np.random.default_rng(0).normal(size=1 << 21).astype(np.float32)
  tensors = (
      (name, noise[i : i + int(np.prod(entry.their_shape))].reshape(entry.their_shape))
      for entry in convert.entries(config) for i, (name, *_) in enumerate(entry.names)
  )
  if torch_file:
    import torch
    torch.save({n: torch.tensor(a) for n, a in tensors}, folder / 'pytorch_model.bin')
  else:
    safetensors_io.write_folder(folder, tensors)
  return folder


def peak_growth(code, *args):
  """Runs code and returns by how many bytes its peak RSS is over its RSS at `start()`."""
  prelude = '''
      import resource, sys
      import jax, numpy as np
      from moejax.convert import folder as convert
      from moejax.model import Model
      jax.numpy.zeros(9).block_until_ready()
      def now():
        fields = dict(l.split(':') for l in open('/proc/self/status') if l.startswith('Vm'))
        return int(fields['VmRSS'].split()[0]) * 1024
      def start():
        open('/proc/self/clear_refs', 'w').write('5')
        return now()
      def peak():
        fields = dict(l.split(':') for l in open('/proc/self/status') if l.startswith('Vm'))
        return int(fields['VmHWM'].split()[0]) * 1024
  '''
  script = textwrap.dedent(prelude) + textwrap.dedent(code)
  done = subprocess.run(
      [sys.executable, '-c', script, *map(str, args)], capture_output=True, text=True, cwd=ROOT,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}, timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


LOAD = '''
    before = start()
    model = convert.from_hf(sys.argv[1])
    jax.block_until_ready(model.params)
    print([peak() - before, sum(a.nbytes for a in jax.tree.leaves(model.params))])
'''
STREAM = '''
    before = start()
    convert.convert_folder(sys.argv[1], sys.argv[2])
    print([peak() - before, 0])
'''
EXPORT = '''
    model = convert.from_hf(sys.argv[1])
    before = start()
    convert.to_hf(model, sys.argv[2])
    print([peak() - before, 0])
'''
RELOAD = '''
    before = start()
    model = Model.load(sys.argv[1])
    jax.block_until_ready(model.params)
    print([peak() - before, sum(a.nbytes for a in jax.tree.leaves(model.params))])
'''


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp('memory')
  yield write_source(folder / 'hf', CONFIG)
  shutil.rmtree(folder)


def test_loading_takes_the_target_and_at_most_two_of_its_largest_leaves(source):
  growth, target = peak_growth(LOAD, source)
  assert target > 500 * MB
  assert growth < target + 2 * STACK
  assert growth > target  # else nothing was measured


@pytest.mark.long
def test_streaming_between_folders_takes_no_more_than_a_few_experts(source):
  expert = STACK // 16
  ours, back = source.parent / 'ours', source.parent / 'back'
  assert peak_growth(STREAM, source, ours)[0] < 4 * expert + SLACK
  assert peak_growth(STREAM, ours, back)[0] < 4 * expert + SLACK
  growth, target = peak_growth(RELOAD, ours)
  assert target < growth < target + 2 * STACK
  returned = safetensors_io.read_folder(back)
  for name, info in safetensors_io.read_folder(source).items():
    assert np.array_equal(info.read(), returned[name].read()), name


def test_export_from_memory_takes_no_more_than_two_of_the_largest_leaves(source):
  assert peak_growth(EXPORT, source, source.parent / 'export')[0] < STACK


@pytest.mark.long
@pytest.mark.torch
def test_a_torch_file_is_mapped_too(tmp_path):
  import dataclasses
  config = dataclasses.replace(CONFIG, num_layers=1, num_decoder_layers=1)
  source = write_source(tmp_path / 'hf', config, torch_file=True)
  expert = STACK // 16
  torch_first = '\n    import torch\n' + STREAM
  assert peak_growth(torch_first, source, tmp_path / 'ours')[0] < 4 * expert + SLACK
  shutil.rmtree(tmp_path / 'hf')
  shutil.rmtree(tmp_path / 'ours')
