"""Tiny Hugging Face folders: made by torch and transformers, or (without them) by us."""

import jax
import pytest

from moejax.config import ModelConfig, MoeConfig
from moejax.convert import folder as convert
from moejax.model import Model

SIZES = dict(
    vocab_size=61, d_model=16, d_kv=6, d_ff=24, num_heads=3, num_layers=3, num_decoder_layers=2
)


def tiny_config(**kwargs):
  moe = MoeConfig(num_experts=3, expert_capacity=4, decoder_sparse_step=1)
  return ModelConfig(**{**SIZES, 'family': 'switch', 'moe': moe, **kwargs})


@pytest.fixture
def switch_model():
  return Model.init(tiny_config(), jax.random.key(0))


@pytest.fixture
def hf_folder(switch_model, tmp_path):
  """A Switch Transformer as a Hugging Face folder, written without torch."""
  convert.to_hf(switch_model, tmp_path / 'hf')
  return tmp_path / 'hf'
