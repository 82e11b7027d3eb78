r"""Measures a model on text and prints JSON: loss, accuracy, expert load, agreement, baselines.

A model folder is what moejax wrote, compressed or not; text is a file, a folder, a glob or
'archive::glob'.

Example:
  python -m experiments.evaluate --model runs/sotu/model \
      --data 'experiments/data/sotu.tar.xz::sotu/???0_*.txt' --against runs/other/model
"""

import time
from typing import Any

from absl import flags

from experiments import flags as common
from moejax import account, evaluate, files, progress
from moejax import config as config_lib
from moejax import model as model_lib
from moejax.data import batches as batches_lib
from moejax.data import text
from moejax.data import tokenizer as tokenizer_lib

_MODEL = flags.DEFINE_string('model', None, 'Model folder.')
_DATA = flags.DEFINE_multi_string('data', [], 'Text to measure on. Can be repeated.')
_AGAINST = flags.DEFINE_string('against', None, 'Another model folder, for agreement.')
_ABLATE = flags.DEFINE_bool('ablate', False, 'Also measure with the outputs of all experts zero.')
_BIGRAM = flags.DEFINE_multi_string(
    'bigram', [], 'Train a token bigram on this text and score it at the same words.'
)
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 32, 'Samples a batch.', lower_bound=1)
_MAX_BATCHES = flags.DEFINE_integer(
    'max_batches', 0, 'Use only so many batches, spread over the text; 0 uses all.', lower_bound=0
)
_SAMPLE_LENGTH = flags.DEFINE_integer(
    'sample_length', 0, 'Tokens a sample; 0 takes what the model was trained with.', lower_bound=0
)
_EXAMPLES = flags.DEFINE_integer(
    'examples', 0, 'Also return so many passages with the words the model would fill in.',
    lower_bound=0,
)
_ACCOUNT = flags.DEFINE_bool(
    'account', False,
    'Also count bytes, parameters, non-zeros and FLOPs of the model, each layer and each part, '
    'and foresee the most memory that a pass over one sample takes.'
)
_OUT = flags.DEFINE_string('out', None, 'Also write the JSON to this file.')


def bigram_loss(
    config: config_lib.ModelConfig, rows: list[Any], tokenizer: tokenizer_lib.Tokenizer,
    sources: list[str],
) -> float:
  """Loss of a Kneser-Ney bigram of the sources at the masked words of the batches."""
  corpus = batches_lib.tokenize(text.documents(sources, '--bigram'), tokenizer, '--bigram')
  first = tokenizer.first_sentinel
  bigram = evaluate.Bigram.train(corpus, config.vocab_size, first)
  return bigram.content_loss(rows, config, first)


def measure(folder: str, against: str | None) -> dict[str, Any]:
  """Everything the flags ask for, as one JSON object."""
  files.require_folder(folder)
  model = model_lib.Model.load(folder)
  reference = model_lib.Model.load(against) if against else None
  tokenizer = tokenizer_lib.load(folder)
  data = evaluate.data_config(
      *filter(None, (folder, against)), sample_length=_SAMPLE_LENGTH.value
  )
  batches = evaluate.fixed_batches(
      model.config, data,
      text.documents(_DATA.value, '--data'), tokenizer, batch_size=_BATCH_SIZE.value,
      name='--data',
  )
  rows = list(evaluate.spread(batches, _MAX_BATCHES.value))

  def run(params, label, other=None, examples=0):
    return evaluate.evaluate(
        model_lib.Model(model.config, params), progress.bar(rows, label=label, unit='batch'),
        first_sentinel=tokenizer.first_sentinel, against=other, examples=examples,
    )

  start = time.monotonic()
  result: dict[str, Any] = {'model': folder, 'data': list(_DATA.value), 'batches': len(rows)}
  result |= run(model.params, 'evaluate', reference, _EXAMPLES.value)
  decoder = isinstance(model.config, config_lib.StackConfig)
  ends = model.config.eos_ids if decoder else (model.config.eos_id,)
  for example in result.get('examples', ()):
    example['pieces'], example['fills'] = evaluate.example_pieces(example, tokenizer, ends)
  result['seconds'] = round(time.monotonic() - start, 3)
  if against:
    result['against'] = against
  if _ACCOUNT.value:
    result['account'] = {
        **account.summary(model.params, model.config),
        'nonzeros': account.nonzeros(model.params),
        'forward_peak_bytes': account.peak_bytes(model.config, model.params),
        'layers': account.layers(model.params, model.config),
        'parts': account.parts(model.params, model.config),
    }
  if _ABLATE.value and model.config.moe is not None:
    cut = run(evaluate.without_experts(model.params), 'without experts')
    result['zeroed_experts'] = {
        'content_loss': cut['content_loss'],
        'cost': cut['content_loss'] - result['content_loss'],
    }
  if _BIGRAM.value:
    result['bigram_content_loss'] = bigram_loss(model.config, rows, tokenizer, _BIGRAM.value)
  return result


def main() -> None:
  common.require('model')
  if _OUT.value:
    files.require_writable(_OUT.value)
  result = measure(str(_MODEL.value), _AGAINST.value)
  if _OUT.value:
    files.write_json(_OUT.value, result)
  print(files.json_text(result, indent=2))


if __name__ == '__main__':
  common.run(main, __doc__)
