"""BERT (arXiv 1810.04805) as Hugging Face stores it: bare, for masked words, or with labels."""

from typing import Any

from moejax.config import EncoderConfig
from moejax.convert import decoder
from moejax.convert.family import Family, Files
from moejax.convert.hf_config import Fields
from moejax.convert.rules import Rule

ARCHITECTURES = {
    'none': 'BertModel', 'mlm': 'BertForMaskedLM', 'labels': 'BertForSequenceClassification',
}
# A list of positions that files of old versions hold, and heads of pre-training that are not ours.
_IGNORED = (r'(bert\.)?embeddings\.position_ids', r'cls\.seq_relationship\.(weight|bias)',
            r'bert\.pooler\.dense\.(weight|bias)')


def read_config(fields: Fields) -> EncoderConfig:
  """Our config; which head there is comes from `architectures`, bare if it does not say."""
  fields.require('is_decoder', False)
  fields.require('is_encoder_decoder', False)
  fields.require('position_embedding_type', 'absolute')
  fields.require('chunk_size_feed_forward', 0)
  fields.take('attention_probs_dropout_prob', 0.1, int, float)
  fields.take('classifier_dropout', None, int, float, type(None))
  named = fields.take('architectures', None, list, type(None)) or ['BertModel']
  heads = {theirs: ours for ours, theirs in ARCHITECTURES.items()}
  heads['BertForPreTraining'] = 'mlm'
  head = heads.get(str(named[0]), 'none')
  width, count = fields.take('hidden_size', 768, int), fields.take('num_attention_heads', 12, int)
  names = fields.take('id2label', None, dict, type(None))
  labels = fields.take('num_labels', len(names) if names else 2, int)
  fields.take('label2id', None, dict, type(None))
  fields.take('problem_type', None, str, type(None))
  fields.require('tie_word_embeddings', True)
  ids = decoder.read_ids(fields, 0, None, None)
  return EncoderConfig(
      head=head, labels=labels if head == 'labels' else 0, pooler=head == 'none',
      vocab_size=fields.take('vocab_size', 30522, int), d_model=width, d_head=width // count,
      d_ff=fields.take('intermediate_size', 3072, int), num_heads=count, num_kv_heads=count,
      num_layers=fields.take('num_hidden_layers', 12, int),
      max_positions=fields.take('max_position_embeddings', 512, int),
      token_types=fields.take('type_vocab_size', 2, int),
      activation=fields.activation(fields.take('hidden_act', 'gelu', str)),
      norm_eps=decoder.number(fields, 'layer_norm_eps', 1e-12),
      dropout_rate=decoder.number(fields, 'hidden_dropout_prob', 0.1),
      initializer_std=decoder.number(fields, 'initializer_range', 0.02),
      pad_id=ids['pad_id'], bos_id=ids['bos_id'], eos_ids=ids['eos_ids'],
  )


def write_config(config: EncoderConfig) -> dict[str, Any]:
  """The inverse of `read_config`."""
  decoder.require_plain(
      config, norm='layer', rope=None, qk_norm='', clip_qkv=None, gated=False, moe=None,
      attention_bias=True, attention_out_bias=True, ffn_bias=True, head_bias=False,
      sliding_window=None, num_kv_heads=config.num_heads,
      d_head=config.d_model // config.num_heads, pooler=config.head == 'none',
      words_activation=config.activation,
  )
  labels = {'id2label': {str(i): f'LABEL_{i}' for i in range(config.labels)}}
  return {
      'architectures': [ARCHITECTURES[config.head]], 'vocab_size': config.vocab_size,
      'hidden_size': config.d_model, 'intermediate_size': config.d_ff,
      'num_hidden_layers': config.num_layers, 'num_attention_heads': config.num_heads,
      'max_position_embeddings': config.max_positions, 'type_vocab_size': config.token_types,
      'hidden_act': config.activation, 'layer_norm_eps': config.norm_eps,
      'hidden_dropout_prob': config.dropout_rate, 'initializer_range': config.initializer_std,
      'tie_word_embeddings': True, **(labels if config.labels else {}),
      **decoder.write_ids(config),
  }


def _rule(
    bare: bool, theirs: str, ours: str, axes: str, layers: str = '', copies: tuple[str, ...] = ()
) -> Rule:
  """A rule for 'bert.<theirs>' or, in a bare model, '<theirs>'; either is read."""
  names = f'bert.{theirs}', theirs
  return Rule(
      names[bare], ours, axes, layers, copies=copies,
      aliases=tuple(n for name in (names[bare], names[not bare]) for n in _older(name))[1:],
  )


def _older(name: str) -> tuple[str, ...]:
  """A name, and what the first files called it."""
  old = {'LayerNorm.weight': 'LayerNorm.gamma', 'LayerNorm.bias': 'LayerNorm.beta'}
  return name, *(name.replace(new, own) for new, own in old.items() if name.endswith(new))


def _pair(
    bare: bool, theirs: str, ours: str, axes: str, bias: str, layers: str = ''
) -> list[Rule]:
  """A weight and its bias."""
  kind = lambda name, path, axes: _rule(bare, f'{theirs}.{name}', path, axes, layers)
  suffix = ours.rpartition('/')
  other = f'{suffix[0]}/bias' if suffix[2] == 'kernel' else f'{ours}_bias'
  return [kind('weight', ours, axes), kind('bias', other, bias)]


def rules(config: EncoderConfig, files: Files | None = None) -> list[Rule]:
  """Every tensor."""
  del files
  ours, bare = 'encoder/layers_{i}', config.head == 'none'
  rows = [
      _rule(bare, 'embeddings.word_embeddings.weight', 'shared/embedding', 'v d -> v d',
            copies=('cls.predictions.decoder.weight',) if config.head == 'mlm' else ()),
      _rule(bare, 'embeddings.position_embeddings.weight', 'shared/positions', 'p d -> p d'),
      _rule(bare, 'embeddings.token_type_embeddings.weight', 'shared/token_types', 'k d -> k d'),
      *_pair(bare, 'embeddings.LayerNorm', 'shared/norm', 'd -> d', 'd -> d'),
  ]
  for theirs, our, axes, bias in (
      ('attention.self.query', 'attention/q', '(n h) d -> d n h', '(n h) -> n h'),
      ('attention.self.key', 'attention/k', '(n h) d -> d n h', '(n h) -> n h'),
      ('attention.self.value', 'attention/v', '(n h) d -> d n h', '(n h) -> n h'),
      ('attention.output.dense', 'attention/o', 'd (n h) -> n h d', 'd -> d'),
      ('attention.output.LayerNorm', 'attention/norm', 'd -> d', 'd -> d'),
      ('intermediate.dense', 'ffn/wi', 'f d -> d f', 'f -> f'),
      ('output.dense', 'ffn/wo', 'd f -> f d', 'd -> d'),
      ('output.LayerNorm', 'ffn/norm', 'd -> d', 'd -> d'),
  ):
    rows += _pair(bare, f'encoder.layer.{{i}}.{theirs}', f'{ours}/{our}', axes, bias, 'all')
  if config.pools:
    rows += _pair(bare, 'pooler.dense', 'pooler/kernel', 'a d -> d a', 'd -> d')
  if config.head == 'labels':
    rows += [Rule('classifier.weight', 'head/kernel', 'l d -> d l'),
             Rule('classifier.bias', 'head/bias', 'l -> l')]
  if config.head == 'mlm':
    theirs = 'cls.predictions'
    rows += [
        Rule(f'{theirs}.transform.dense.weight', 'head/transform', 'a d -> d a'),
        Rule(f'{theirs}.transform.dense.bias', 'head/transform_bias', 'd -> d'),
        Rule(f'{theirs}.transform.LayerNorm.weight', 'head/norm', 'd -> d',
             aliases=(f'{theirs}.transform.LayerNorm.gamma',)),
        Rule(f'{theirs}.transform.LayerNorm.bias', 'head/norm_bias', 'd -> d',
             aliases=(f'{theirs}.transform.LayerNorm.beta',)),
        Rule(f'{theirs}.bias', 'head/bias', 'v -> v', copies=(f'{theirs}.decoder.bias',)),
    ]
  return rows


def sizes(config: EncoderConfig) -> dict[str, int]:
  """Axis letters to sizes; a is d too, k kinds of tokens, l labels."""
  return {
      'v': config.vocab_size, 'd': config.d_model, 'a': config.d_model, 'n': config.num_heads,
      'h': config.d_head, 'f': config.d_ff, 'p': config.max_positions, 'k': config.token_types,
      'l': config.labels,
  }


FAMILY = Family(
    name='bert', model_types=('bert',), architecture='BertModel', read_config=read_config,
    write_config=write_config, rules=rules, sizes=sizes,
    layers=lambda config: {'all': range(config.num_layers)}, ignored=_IGNORED,
)
