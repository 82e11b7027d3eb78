"""Text to the batches that a model's architecture is trained and measured on."""

from collections.abc import Iterable
from typing import Any

import jax

from moejax.config import DataConfig, EncDecConfig, EncoderConfig, ModelConfig, StackConfig
from moejax.data import batches as batches_lib
from moejax.data import masking, packing, span_corruption, whole_texts
from moejax.data import tokenizer as tokenizer_lib
from moejax.errors import UserError

# Published models round their vocabulary up to please the hardware, by less than 2 %.
_LEAST_SHARE = 0.98


def num_sentinels(config: ModelConfig, data: DataConfig) -> int:
  """Sentinels that the batches of a model need: a decoder's need none, masked words one."""
  if isinstance(config, EncoderConfig):
    return int(config.head == 'mlm' and config.mask_id is None)
  return 0 if isinstance(config, StackConfig) else data.num_sentinels


def first_sentinel(config: ModelConfig) -> int:
  """The least sentinel id of a model without its tokenizer: T5's 32000, else 100 below the end."""
  return 32000 if config.vocab_size == 32128 else max(config.vocab_size - 100, 0)


def check_tokenizer(config: ModelConfig, tokenizer: tokenizer_lib.Tokenizer) -> None:
  """Raises UserError unless the model's vocabulary is the tokenizer's.

  A model may have 2 % more ids, which are never used: T5's tokenizer has 32100, its models have
  32128.
  """
  found, wanted = tokenizer.vocab_size, config.vocab_size
  if found > wanted or found < wanted * _LEAST_SHARE:
    raise UserError(
        f'the tokenizer has {found} ids, model.vocab_size is {wanted}; make them equal, or use the '
        'tokenizer.json that came with the model'
    )


def end_of_text(config: StackConfig, tokenizer: tokenizer_lib.Tokenizer) -> int:
  """The id that packed documents end with: the model's first, else the tokenizer's.

  Raises:
    UserError: neither has one.
  """
  found = config.eos_ids[0] if config.eos_ids else tokenizer.eos_id
  if found is None:
    raise UserError(
        'model.eos_ids is empty and the tokenizer has no </s> or <|endoftext|>: packed documents '
        'need an id that ends each; set model.eos_ids'
    )
  return found


def make_batches(
    config: ModelConfig,
    data: DataConfig,
    documents: Iterable[str],
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    batch_size: int,
    fixed: bool = False,
    name: str = 'data.train_files',
) -> batches_lib.Batches:
  """Tokenizes documents and lays them out for a model, as the data settings say.

  Args:
    fixed: for evaluation: one pass, the same on every call.
    name: what to call the documents in messages.

  Raises:
    UserError: the tokenizer is another model's, the text is shorter than one sample, or the
      settings ask for samples that the model or its tokenizer has no room for.
  """
  check_tokenizer(config, tokenizer)
  if isinstance(config, EncoderConfig) and config.head != 'mlm':
    return _whole(config, data, documents, tokenizer, batch_size, fixed, name)
  if isinstance(config, StackConfig):
    return _packed(config, data, documents, tokenizer, batch_size, fixed, name)
  return _corrupted(config, data, documents, tokenizer, batch_size, fixed, name)


def batch_spec(
    config: ModelConfig, data: DataConfig, batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape and dtype of each array of a training batch, without any text."""
  if isinstance(config, StackConfig):
    return packing.packed_spec(batch_size, data.sequence_length)
  lengths = span_corruption.lengths_for(data.encoder_length, data.noise_density, data.mean_span)
  return batches_lib.span_spec(batch_size, lengths)


def _corrupted(
    config: EncDecConfig, data: DataConfig, documents: Iterable[str],
    tokenizer: tokenizer_lib.Tokenizer, batch_size: int, fixed: bool, name: str,
) -> batches_lib.SpanBatches:
  lengths = span_corruption.lengths_for(data.encoder_length, data.noise_density, data.mean_span)
  if lengths.spans > data.num_sentinels:
    raise UserError(
        f'data.num_sentinels = {data.num_sentinels}: a sample of {lengths.tokens} tokens has '
        f'{lengths.spans} spans; raise it or lower data.encoder_length'
    )
  if lengths.spans > tokenizer.num_sentinels:
    raise UserError(
        f'the tokenizer has {tokenizer.num_sentinels} sentinels, a sample of {lengths.tokens} '
        f'tokens {lengths.spans} spans; lower data.encoder_length'
    )
  return batches_lib.SpanBatches(
      corpus=batches_lib.tokenize(documents, tokenizer, name, sample_tokens=lengths.tokens),
      batch_size=batch_size, lengths=lengths, vocab_size=tokenizer.vocab_size, seed=data.seed,
      noise_density=data.noise_density, mean_span=data.mean_span, pad_id=config.pad_id,
      eos_id=config.eos_id, decoder_start_id=config.decoder_start_id, fixed=fixed,
  )


def _packed(
    config: StackConfig, data: DataConfig, documents: Iterable[str],
    tokenizer: tokenizer_lib.Tokenizer, batch_size: int, fixed: bool, name: str,
) -> packing.LmBatches:
  length = data.sequence_length
  if config.rope is None and length > config.max_positions:
    raise UserError(
        f'data.sequence_length = {length}: the model has learned model.max_positions = '
        f'{config.max_positions}; lower it'
    )
  eos_id = end_of_text(config, tokenizer)
  corpus = batches_lib.tokenize(
      documents, tokenizer, name, sample_tokens=length, shortest=1,
      length_field='data.sequence_length',
  )
  common: dict[str, Any] = dict(
      corpus=corpus, batch_size=batch_size, sequence_length=length, seed=data.seed,
      pad_id=config.pad_id or 0, eos_id=eos_id, fixed=fixed,
  )
  if not isinstance(config, EncoderConfig):
    return packing.LmBatches(**common)
  return masking.MaskedBatches(
      mask_id=mask_of(config, tokenizer), vocab_size=tokenizer.vocab_size,
      noise_density=data.noise_density, **common,
  )


def mask_of(config: EncoderConfig, tokenizer: tokenizer_lib.Tokenizer) -> int:
  """The id that stands for a masked word: the model's, else the tokenizer's.

  Raises:
    UserError: neither has one.
  """
  found = tokenizer.mask_id if config.mask_id is None else config.mask_id
  if found is None:
    raise UserError(
        'model.mask_id is null and the tokenizer has no [MASK] or <extra_id_0>: set model.mask_id '
        'to the id that stands for masked words'
    )
  return found


def _whole(
    config: EncoderConfig, data: DataConfig, documents: Iterable[str],
    tokenizer: tokenizer_lib.Tokenizer, batch_size: int, fixed: bool, name: str,
) -> whole_texts.TextBatches:
  if data.sequence_length > config.max_positions:
    raise UserError(
        f'data.sequence_length = {data.sequence_length}: the model has learned '
        f'model.max_positions = {config.max_positions}; lower it'
    )
  return whole_texts.TextBatches(
      texts=tuple(filter(
          len, whole_texts.framed(documents, tokenizer, data.sequence_length, name)
      )),
      batch_size=batch_size, sequence_length=data.sequence_length, seed=data.seed,
      pad_id=config.pad_id or 0, fixed=fixed,
  )
