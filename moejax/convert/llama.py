"""Llama (arXiv 2302.13971) and Mistral as Hugging Face stores them: dense, SwiGLU."""

from typing import Any

from moejax.config import DecoderConfig
from moejax.convert import decoder
from moejax.convert.family import Family, Files
from moejax.convert.hf_config import Fields
from moejax.convert.rules import Rule

_LLAMA = {
    'vocab_size': 32000, 'hidden_size': 4096, 'intermediate_size': 11008, 'num_hidden_layers': 32,
    'num_attention_heads': 32, 'max_position_embeddings': 2048, 'rms_norm_eps': 1e-6,
    'theta': 1e4, 'bos': 1, 'eos': 2,
}
_MISTRAL = {
    **_LLAMA, 'intermediate_size': 14336, 'num_key_value_heads': 8,
    'max_position_embeddings': 4096 * 32,
}


def read_llama(fields: Fields) -> DecoderConfig:
  """Our config of a Llama."""
  bias = fields.take('attention_bias', False, bool)
  return DecoderConfig(
      family='llama', attention_bias=bias, attention_out_bias=bias,
      ffn_bias=fields.take('mlp_bias', False, bool), **decoder.read_plain(fields, _LLAMA),
  )


def read_mistral(fields: Fields) -> DecoderConfig:
  """Our config of a Mistral, which has a sliding window."""
  window = fields.take('sliding_window', 4096, int, type(None))
  return DecoderConfig(
      family='mistral', sliding_window=window, **decoder.read_plain(fields, _MISTRAL)
  )


def write_config(config: DecoderConfig) -> dict[str, Any]:
  """The inverse of both."""
  decoder.require_plain(
      config, norm='rms', qk_norm='', clip_qkv=None, gated=True, head_bias=False, moe=None,
      full_attention_layers=(), attention_out_bias=config.attention_bias,
  )
  values = decoder.write_plain(config)
  if config.family == 'mistral':
    decoder.require_plain(config, attention_bias=False, ffn_bias=False)
    return {**values, 'sliding_window': config.sliding_window}
  decoder.require_plain(config, sliding_window=None)
  return {**values, 'attention_bias': config.attention_bias, 'mlp_bias': config.ffn_bias}


def rules(config: DecoderConfig, files: Files | None = None) -> list[Rule]:
  """Every tensor."""
  del files
  theirs, ours = 'layers.{i}.mlp', 'decoder/layers_{i}/ffn'
  rows = [*decoder.base_rules(config), *decoder.matrices(theirs, ours, 'all')]
  if config.ffn_bias:
    rows += [
        decoder.rule(f'{theirs}.{name}_proj.bias', f'{ours}/{our}_bias', f'{a} -> {a}', 'all')
        for name, our, a in (('gate', 'gate', 'f'), ('up', 'wi', 'f'), ('down', 'wo', 'd'))
    ]
  return rows


_SHARED: dict[str, Any] = dict(
    write_config=write_config, rules=rules, sizes=decoder.sizes, layers=decoder.layers,
    ignored=decoder.IGNORED,
)
FAMILIES = (
    Family(name='llama', model_types=('llama',), architecture='LlamaForCausalLM',
           read_config=read_llama, **_SHARED),
    Family(name='mistral', model_types=('mistral',), architecture='MistralForCausalLM',
           read_config=read_mistral, **_SHARED),
)
