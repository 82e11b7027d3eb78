"""Tiny Hugging Face folders: made by torch and transformers, or (without them) by us."""

import json

import numpy as np
import pytest

from moejax import safetensors_io, tree
from moejax.config import EncDecConfig, EncDecMoeConfig
from moejax.convert import folder as convert
from moejax.model import Model

SIZES = dict(
    vocab_size=61, d_model=16, d_kv=6, d_ff=24, num_heads=3, num_layers=3, num_decoder_layers=2
)


def tiny_config(**kwargs):
  moe = EncDecMoeConfig(num_experts=3, expert_capacity=4, decoder_sparse_step=1)
  return EncDecConfig(**{**SIZES, 'family': 'switch', 'moe': moe, **kwargs})


def random_model(config):
  """Random params of the shapes the rules know, made without tracing the model."""
  rng = np.random.default_rng(0)
  entries = convert.entries(config)
  return Model(config, tree.unflatten({
      e.ours: rng.normal(size=e.shape).astype(np.float32) * 0.3 for e in entries
  }))


@pytest.fixture(scope='session')
def switch_model():
  return random_model(tiny_config())


@pytest.fixture
def hf_folder(switch_model, tmp_path):
  """A Switch Transformer as a Hugging Face folder, written without torch."""
  convert.to_hf(switch_model, tmp_path / 'hf')
  return tmp_path / 'hf'


@pytest.fixture(scope='session')
def write_recorded():
  """Writes recorded tensors whose names start with `kind` as a Hugging Face folder."""

  def write(folder, arrays, config, kind='param/'):
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config))
    tensors = ((k.removeprefix(kind), v) for k, v in arrays.items() if k.startswith(kind))
    safetensors_io.write_folder(folder, tensors)
    return folder

  return write
