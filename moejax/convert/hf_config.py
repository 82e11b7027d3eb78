"""Hugging Face config.json against ours, by a whitelist: no field is passed over unread."""

from collections.abc import Mapping
import dataclasses
from pathlib import Path
from typing import Any

from moejax import files
from moejax.config import ACTIVATIONS
from moejax.errors import UserError, did_you_mean

# Fields with no bearing on what the model computes.
HARMLESS = frozenset((
    'architectures', 'transformers_version', 'torch_dtype', 'dtype', 'use_cache', '_name_or_path',
    'output_attentions', 'output_hidden_states', 'output_past', 'output_router_logits',
    'output_scores', 'return_dict', 'return_dict_in_generate', 'id2label', 'label2id',
    'num_labels', 'problem_type', 'chunk_size_feed_forward', 'bos_token_id', 'sep_token_id',
    'task_specific_params', 'n_positions', 'gradient_checkpointing', 'finetuning_task', 'prefix',
    'tokenizer_class', 'tf_legacy_loss', 'use_bfloat16', 'torchscript', 'classifier_dropout',
    'forced_bos_token_id', 'forced_eos_token_id', 'suppress_tokens', 'begin_suppress_tokens',
    'max_length', 'min_length', 'do_sample', 'early_stopping', 'num_beams', 'num_beam_groups',
    'diversity_penalty', 'temperature', 'top_k', 'top_p', 'typical_p', 'repetition_penalty',
    'length_penalty', 'no_repeat_ngram_size', 'encoder_no_repeat_ngram_size', 'bad_words_ids',
    'num_return_sequences', 'remove_invalid_values', 'exponential_decay_length_penalty',
    'add_router_probs', 'router_type', 'batch_prioritized_routing',
    'add_cross_attention', 'cross_attention_hidden_size', 'attn_implementation', 'auto_map',
    '_attn_implementation_autoset', 'tie_encoder_decoder',
))
# Fields that must have one value for moejax to compute the same.
FIXED: Mapping[str, tuple[Any, ...]] = {
    'quantization_config': (None,), 'pruned_heads': ({}, None), 'router_dtype': ('float32',),
}
_ACTIVATIONS = {
    **{a: a for a in ACTIVATIONS if a != 'drelu'}, 'swish': 'silu', 'gelu_pytorch_tanh': 'gelu_new',
}


class Fields:
  """The fields of one config.json, each taken once; what is left at the end is an error."""

  def __init__(self, values: Mapping[str, Any], where: Path | str):
    self.where = where
    self._left = dict(values)
    self._known: set[str] = set()

  def take(self, name: str, default: Any, *kinds: type) -> Any:
    """Removes and returns a field; `kinds` are the JSON types it may have."""
    self._known.add(name)
    value = self._left.pop(name, default)
    is_bool = isinstance(value, bool)
    if kinds and (not isinstance(value, kinds) or (is_bool and bool not in kinds)):
      expected = ' or '.join('null' if k is type(None) else k.__name__ for k in kinds)
      raise UserError(f'{self.where}: {name} = {value!r}: expected {expected}')
    return value

  def rename(self, synonyms: Mapping[str, str]) -> None:
    """Fields called by a synonym are from now on called by their own name."""
    for name, own in synonyms.items():
      if name in self._left:
        self._left[own] = self._left.pop(name)

  def require(self, name: str, *allowed: Any) -> None:
    """Takes a field that must have one of the values, the first if it is not there."""
    value = self.take(name, allowed[0])
    if value not in allowed:
      raise UserError(f'{self.where}: {name} = {value!r}: moejax computes only {allowed[0]!r}')

  def activation(self, name: str) -> str:
    """Our name of a Hugging Face activation; an unknown one raises UserError."""
    if name not in _ACTIVATIONS:
      raise UserError(
          f'{self.where}: unknown activation {name!r}; moejax has {", ".join(ACTIVATIONS)}'
          f'{did_you_mean(str(name), _ACTIVATIONS)}'
      )
    return _ACTIVATIONS[name]

  def finish(self) -> None:
    """Raises UserError for a field that was not taken and is not known to be harmless."""
    for name, allowed in FIXED.items():
      self.require(name, *allowed)
    unknown = sorted(set(self._left) - HARMLESS)
    if unknown:
      known = {*self._known, *HARMLESS}
      raise UserError(
          f'{self.where}: unknown field {unknown[0]!r}{did_you_mean(unknown[0], known)}: it may '
          'change what the model computes; correct its name, or remove it'
      )


@dataclasses.dataclass(frozen=True)
class Parsed:
  """A config.json that has been read: its model_type and its fields."""

  model_type: str
  fields: Fields
  values: Mapping[str, Any]


def read(folder: Path, model_types: tuple[str, ...]) -> Parsed:
  """Reads config.json and checks its model_type; anything wrong raises UserError."""
  where = folder / 'config.json'
  values = files.read_json(where)
  fields = Fields(values, where)
  kind = fields.take('model_type', None)
  if kind is None:
    raise UserError(f'{where} has no model_type: expected one of {", ".join(model_types)}')
  if kind not in model_types:
    raise UserError(
        f'{where}: unknown model family, model_type = {kind!r}; moejax converts '
        f'{", ".join(model_types)}{did_you_mean(str(kind), model_types)}'
    )
  return Parsed(kind, fields, values)
