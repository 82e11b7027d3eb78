r"""Continues prompts, or answers them where the model is an encoder-decoder, streaming as it goes.

A model folder is what moejax wrote, compressed or not, or a Hugging Face folder. One prompt is
printed token by token; several are run as one batch and printed when done.

Example:
  python -m experiments.generate --model runs/grin/model --prompt 'My fellow citizens'
  python -m experiments.generate --model runs/sotu/model --prompt 'The state of <extra_id_0> is'
"""

from collections.abc import Iterator
import dataclasses
import json
import sys
import time
from typing import Any

from absl import flags
import jax
import numpy as np

from experiments import flags as common
from moejax import convert, files, generate, weights
from moejax.config import StackConfig
from moejax.data import layout
from moejax.data import tokenizer as tokenizer_lib
from moejax.errors import UserError
from moejax.model import Model

_MODEL = flags.DEFINE_string('model', None, 'Model folder.')
_PROMPT = flags.DEFINE_multi_string(
    'prompt', [], "Text to continue; '-' reads standard input. Can be repeated."
)
_TOKENS = flags.DEFINE_integer('max_new_tokens', 128, 'At most so many tokens.', lower_bound=1)
_TEMPERATURE = flags.DEFINE_float('temperature', 0.0, '0 takes the most probable token.')
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Draw among so many tokens; 0 for all.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Draw among the tokens that make up this probability.')
_STOP = flags.DEFINE_multi_string(
    'stop', [], 'A token that ends the text, beside the model\'s own. Can be repeated.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the draws.')
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of activations and cache.')
_TERNARY = flags.DEFINE_enum(
    'ternary', 'as_stored', ['as_stored', 'two_bit', 'sub_bit'],
    'Code of ternary weights in memory: two_bit is quicker and thrice the size, sub_bit what the '
    'TPU kernel below one bit decodes.'
)
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object a prompt.')


def stop_ids(model: Model, tokenizer: tokenizer_lib.Tokenizer, texts: list[str]) -> tuple[int, ...]:
  """The model's own end of text and those given, each of which must be one token."""
  ids = list(generate.stop_ids_of(model.config))
  for text in texts:
    found = tokenizer.encode(text)
    if len(found) != 1:
      raise UserError(f'--stop {text!r} is {len(found)} tokens: name a text that is one')
    ids.append(int(found[0]))
  return tuple(ids)


def prompt_ids(model: Model, tokenizer: tokenizer_lib.Tokenizer, prompt: str) -> list[int]:
  """A prompt's tokens, with the special ones that the tokenizer adds and an encoder needs."""
  text = sys.stdin.read() if prompt == '-' else prompt
  ids = tokenizer.encode(text, special=True).tolist()
  if not isinstance(model.config, StackConfig) and ids[-1:] != [model.config.eos_id]:
    ids.append(model.config.eos_id)
  if not ids:
    raise UserError('--prompt is empty: name some text')
  return ids


def run(model: Model, tokenizer: tokenizer_lib.Tokenizer) -> None:
  prompts = [prompt_ids(model, tokenizer, prompt) for prompt in _PROMPT.value]
  stops = stop_ids(model, tokenizer, _STOP.value)
  options: dict[str, Any] = dict(
      max_new_tokens=_TOKENS.value, stop_ids=stops, key=jax.random.key(_SEED.value),
      dtype=_DTYPE.value,
      sampling=generate.Sampling(
          temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value
      ),
  )
  # Sentinels tell which gap an answer fills.
  skip = isinstance(model.config, StackConfig)
  decode = lambda ids: tokenizer.decode([i for i in ids if i not in stops], skip_special=skip)
  start = time.monotonic()
  if len(prompts) == 1 and not _JSON.value:
    count = print_stream(generate.stream(model, prompts, **options), decode)
  else:
    made = generate.generate(model, prompts, **options)
    count = int(made.lengths.sum())
    for prompt, ids, stopped in zip(_PROMPT.value, made.rows(), made.stopped):
      print_row(prompt, ids, bool(stopped), decode(ids))
  seconds = time.monotonic() - start
  print(f'{count} tokens, {count / seconds:.1f} a second with compilation', file=sys.stderr)


def print_stream(pieces: Iterator[np.ndarray], decode: Any) -> int:
  """Prints one row's text as it comes; returns the number of its tokens."""
  count = 0

  def rows():
    nonlocal count
    for piece in pieces:
      count += piece.shape[1]
      yield piece[0].tolist()

  for text in generate.text_pieces(rows(), decode):
    print(text, end='', flush=True)
  print()
  return count


def print_row(prompt: str, ids: list[int], stopped: bool, text: str) -> None:
  if _JSON.value:
    row = {'prompt': prompt, 'text': text, 'tokens': ids, 'stopped': stopped}
    print(json.dumps(row, ensure_ascii=False))
  else:
    print(f'{prompt}\n{text}\n')


def recoded(model: Model, code: str) -> Model:
  """The model with its ternary weights in a code; the weights are the same ones.

  Raises:
    UserError: it has no ternary weights.
  """
  if code == 'as_stored':
    return model
  params = {'two_bit': weights.two_bit, 'sub_bit': weights.sub_bit}[code](model.params)
  nodes = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, weights.WeightNode))
  if not any(isinstance(n, weights.PackedTernary | weights.BlockTernary) for n in nodes):
    raise UserError(f'--ternary {code}: the model has no ternary weights; leave it out')
  return dataclasses.replace(model, params=params)


def main() -> None:
  common.require('model')
  if not _PROMPT.value:
    raise UserError('--prompt is missing; see --help')
  folder = files.require_folder(str(_MODEL.value))
  tokenizer = tokenizer_lib.load(folder)
  model = convert.load(folder)
  layout.check_tokenizer(model.config, tokenizer)
  run(recoded(model, _TERNARY.value), tokenizer)


if __name__ == '__main__':
  common.run(main, __doc__)
