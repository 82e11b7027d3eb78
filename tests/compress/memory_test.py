"""Peak memory of a compression does not grow with the number of layers."""

import os
from pathlib import Path
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from moejax import store, tree
from moejax.config import EncDecConfig, EncDecMoeConfig
from moejax.model import abstract_params

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
# glibc gives freed blocks back at once, so that resident bytes are those in use.
_MALLOC = {
    'MALLOC_ARENA_MAX': '1', 'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '65536'
}
_RUN = '''
import resource, sys
import numpy as np
from moejax.compress import driver, quantize
rng = np.random.default_rng(0)
tokens = rng.integers(2, 150, (8, 32)).astype(np.int32)
batch = {'encoder_tokens': tokens, 'decoder_tokens': tokens, 'targets': tokens,
         'weights': np.ones((8, 32), np.float32)}
for model in sys.argv[1:]:
  driver.compress(model, quantize.quantize(expert_group=4), [batch], model + '_compressed')
  print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
'''


def save_model(folder, layers):
  """A model with so many layers of 16 MiB of experts."""
  config = EncDecConfig(
      vocab_size=256, d_model=256, d_kv=16, d_ff=512, num_heads=2, num_layers=layers,
      num_decoder_layers=1, relative_attention_num_buckets=8,
      moe=EncDecMoeConfig(num_experts=16, encoder_sparse_step=1, decoder_sparse_step=0),
  )
  rng = np.random.default_rng(0)
  leaves = (
      (path, rng.standard_normal(leaf.shape, np.float32) * 0.05)
      for path, leaf in tree.flatten(abstract_params(config)).items()
  )
  store.save_folder(folder, config, leaves)
  return str(folder)


@pytest.mark.long
def test_peak_memory_is_independent_of_layers(tmp_path):
  models = [save_model(tmp_path / str(layers), layers) for layers in (2, 12)]
  # In one process: what XLA's compiler takes at its height differs by megabytes between processes.
  done = subprocess.run(
      [sys.executable, '-c', _RUN, *models], capture_output=True, text=True, check=True, cwd=ROOT,
      env={**os.environ, **_MALLOC, 'XLA_FLAGS': ''},
  )
  few, many = map(int, done.stdout.split())
  for model, layers in zip(models, (2, 12)):
    paths = store.Source(f'{model}_compressed').paths()
    assert sum('/experts/' in path for path in paths) == 2 * layers
  experts_of_ten_layers = 10 * 2 * 16 * 256 * 512 * jnp.dtype(jnp.float32).itemsize
  assert many - few < 0.1 * experts_of_ten_layers, (few, many)
