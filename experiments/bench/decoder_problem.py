"""The Phi-MoE that both sides load, random weights in a Hugging Face folder, and its batches."""

import json
import pathlib
import tempfile
from typing import Any

import numpy as np

BASE: dict[str, Any] = dict(
    hidden_size=512, intermediate_size=800, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=2, vocab_size=8192, num_local_experts=16,
)
SMALL: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=96, num_local_experts=4,
)
PROMPT, NEW = 32, 32
DTYPES = ('float32', 'bfloat16')


def config(quick: bool) -> dict[str, Any]:
  """config.json: two experts a token, biases in attention and head, no sliding window."""
  return {
      **(SMALL if quick else BASE), 'model_type': 'phimoe', 'architectures': ['PhimoeForCausalLM'],
      'num_experts_per_tok': 2, 'attention_bias': True, 'lm_head_bias': True, 'hidden_act': 'silu',
      'max_position_embeddings': 1024, 'rms_norm_eps': 1e-5, 'router_jitter_noise': 0.01,
      'input_jitter_noise': 0.0, 'router_aux_loss_coef': 0.0, 'tie_word_embeddings': False,
      'sliding_window': None, 'attention_dropout': 0.0, 'rope_theta': 10000.0, 'bos_token_id': 1,
      'eos_token_id': 2, 'dtype': 'float32',
  }


def tensors(values: dict[str, Any]) -> dict[str, np.ndarray]:
  """Tensors by the names that published files use, each entry N(0, 1 / inputs)."""
  d, f, v = values['hidden_size'], values['intermediate_size'], values['vocab_size']
  kv = d // values['num_attention_heads'] * values['num_key_value_heads']
  rng = np.random.default_rng(0)
  result: dict[str, np.ndarray] = {}

  def add(name: str, *shape: int) -> None:
    scale = 1.0 if 'embed' in name else shape[-1] ** -0.5
    result[name] = rng.standard_normal(shape, np.float32) * np.float32(scale)

  def norm(name: str) -> None:
    result[f'{name}.weight'] = np.ones(d, np.float32)
    result[f'{name}.bias'] = np.zeros(d, np.float32)

  add('model.embed_tokens.weight', v, d)
  for i in range(values['num_hidden_layers']):
    layer = f'model.layers.{i}'
    for name, outputs in (('q', d), ('k', kv), ('v', kv), ('o', d)):
      add(f'{layer}.self_attn.{name}_proj.weight', outputs, d)
      result[f'{layer}.self_attn.{name}_proj.bias'] = np.zeros(outputs, np.float32)
    add(f'{layer}.block_sparse_moe.gate.weight', values['num_local_experts'], d)
    for e in range(values['num_local_experts']):
      for name, shape in (('w1', (f, d)), ('w2', (d, f)), ('w3', (f, d))):
        add(f'{layer}.block_sparse_moe.experts.{e}.{name}.weight', *shape)
    norm(f'{layer}.input_layernorm')
    norm(f'{layer}.post_attention_layernorm')
  norm('model.norm')
  add('lm_head.weight', v, d)
  result['lm_head.bias'] = np.zeros(v, np.float32)
  return result


def folder(quick: bool) -> tempfile.TemporaryDirectory:
  """Writes the model; the folder goes when it is closed."""
  from safetensors.numpy import save_file

  made = tempfile.TemporaryDirectory(prefix='moejax-bench-')
  path, values = pathlib.Path(made.name), config(quick)
  (path / 'config.json').write_text(json.dumps(values))
  save_file(tensors(values), path / 'model.safetensors', metadata={'format': 'pt'})
  return made


def tokens(quick: bool, batch: int, length: int) -> np.ndarray:
  """Token ids int32 [batch, length]."""
  high = config(quick)['vocab_size']
  return np.random.default_rng(1).integers(3, high, (batch, length)).astype(np.int32)


def dtypes_where_slow(quick: bool) -> tuple[str, ...]:
  """What a training step and decoding are measured in: they take longest to compile."""
  return DTYPES[:1] if quick else DTYPES


def text_shape(quick: bool) -> tuple[int, int]:
  """Batch and length of the forward pass and the training step."""
  return (2, 16) if quick else (2, 512)
