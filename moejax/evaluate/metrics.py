"""Loss, accuracy, expert load and agreement of models, as sums over batches and then means.

"Content" means the masked words themselves: target positions with sentinels and EOS left out, since
those are nearly free to predict and hide the differences that matter.
"""

from collections.abc import Iterable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import config as config_lib
from moejax import model as model_lib
from moejax import tree
from moejax.data import layout
from moejax.errors import UserError
from moejax.train import step as step_lib

Batch = Mapping[str, Any]


def content_mask(
    config: config_lib.ModelConfig, batch: Batch, first_sentinel: int
) -> jax.Array:
  """float32 [b, t]: 1 on masked words, 0 on sentinels, EOS and padding."""
  return step_lib.content_weights(batch, config, first_sentinel)


def loss_sums(logits_btv: jax.Array, batch: Batch, content_bt: jax.Array) -> dict[str, jax.Array]:
  """Sums of -log p (nats) and of hits over all targets and over content; divide by the weights."""
  losses, hits = step_lib.cross_entropy(logits_btv, batch['targets'])
  weights = batch['weights']
  return {
      'loss': jnp.sum(losses * weights),
      'accuracy': jnp.sum(hits * weights),
      'targets': jnp.sum(weights),
      'content_loss': jnp.sum(losses * content_bt),
      'content_accuracy': jnp.sum(hits * content_bt),
      'content_targets': jnp.sum(content_bt),
  }


def agreement_sums(
    logits_btv: jax.Array, reference_btv: jax.Array, content_bt: jax.Array
) -> dict[str, jax.Array]:
  """Sums over content: same most probable token, and KL(reference || model) in nats."""
  log_p = jax.nn.log_softmax(reference_btv.astype(jnp.float32))
  log_q = jax.nn.log_softmax(logits_btv.astype(jnp.float32))
  same = jnp.argmax(logits_btv, axis=-1) == jnp.argmax(reference_btv, axis=-1)
  divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
  return {
      'top1_agreement': jnp.sum(same * content_bt), 'kl': jnp.sum(divergence * content_bt)
  }


def layer_loads(output: model_lib.Output, batch: Batch, pad_id: int) -> dict[str, jax.Array]:
  """Real tokens that chose each expert, float32 [e], and those it processed, by layer path."""
  loads = {}
  for path, routing in output.routings.items():
    encoder = path.startswith('encoder/')
    real = batch['encoder_tokens'] != pad_id if encoder else batch['weights'] > 0
    real_m1 = real.reshape(-1, 1)
    experts = routing.logits_me.shape[-1]
    chosen = jax.nn.one_hot(routing.choice_mk, experts) * real_m1[..., None]
    loads[f'chosen/{path}'] = chosen.sum((0, 1))
    loads[f'kept/{path}'] = (chosen * routing.keep_mk[..., None]).sum((0, 1))
  return loads


def routing_health(chosen_e: np.ndarray, kept_e: np.ndarray) -> dict[str, Any]:
  """Health of one router from counts: shares, entropy (nats; ln e is even), extremes, drops.

  Returns {'load': [e] shares of the tokens, 'entropy', 'largest_share', 'smallest_share',
  'dropped'}.
  """
  chosen, kept = np.asarray(chosen_e, np.float64), np.asarray(kept_e, np.float64)
  total = max(chosen.sum(), 1.0)
  share = chosen / total
  positive = share[share > 0]
  return {
      'load': [round(float(s), 6) for s in share],
      'entropy': float(-(positive * np.log(positive)).sum()),
      'largest_share': float(share.max()),
      'smallest_share': float(share.min()),
      'dropped': float(1.0 - kept.sum() / total) if chosen.sum() else 0.0,
  }


def without_experts(params: Mapping[str, Any]) -> dict[str, Any]:
  """The params with every expert's output matrix zero, so that sparse layers add nothing."""

  def cut(path, leaf):
    if path.endswith('/experts/wo'):
      return jnp.zeros(leaf.shape, leaf.dtype if tree.is_array(leaf) else jnp.float32)
    return leaf

  return tree.map_paths(cut, params)


@functools.partial(jax.jit, static_argnames=('config', 'first_sentinel', 'dtype'))
def _batch_sums(params, batch, *, config, first_sentinel, dtype):
  """Logits of a batch, content mask, and sums; one program for a model and what it is held to."""
  output = model_lib.forward(config, params, batch, dtype=dtype)
  content = content_mask(config, batch, first_sentinel)
  sums = loss_sums(output.logits_btv, batch, content)
  return output.logits_btv, content, sums | layer_loads(output, batch, config.pad_id)


_agreement_sums = jax.jit(agreement_sums)


def check_comparable(a: config_lib.ModelConfig, b: config_lib.ModelConfig) -> None:
  """Raises UserError unless the two models speak the same tokens."""
  for name in ('vocab_size', 'pad_id', 'eos_id', 'eos_ids', 'decoder_start_id'):
    ours, theirs = getattr(a, name, None), getattr(b, name, None)
    if ours != theirs:
      raise UserError(
          f'the models cannot be compared: {name} is {ours} and {theirs}; '
          'name two models with one tokenizer'
      )


def evaluate(
    model: model_lib.Model,
    batches: Iterable[Batch],
    *,
    first_sentinel: int | None = None,
    against: model_lib.Model | None = None,
    dtype: Any = jnp.float32,
    examples: int = 0,
) -> dict[str, Any]:
  """Means over batches, as JSON values; losses in nats a token.

  Args:
    model: params may be arrays or weight nodes.
    batches: dicts of encoder_tokens [b, s], decoder_tokens, targets, weights [b, t]; for a decoder
      of tokens, targets, weights [b, t].
    first_sentinel: the least id that stands for a masked span and is no content, of an
      encoder-decoder; None for `layout.first_sentinel`.
    against: a model to compare with on the same batches.
    dtype: of the activations.
    examples: rows of the first batch to return with the model's guesses.

  Returns:
    {'loss', 'accuracy', 'targets', 'content_loss', 'content_accuracy', 'content_targets',
    'routing': {layer path: see `routing_health`}}, with `against` also {'agreement': {'top1', 'kl',
    'reference_content_loss'}}, with `examples` also {'examples': see `examples_of`}.

  Raises:
    UserError: no batch, or `against` has another vocabulary.
  """
  if getattr(model.config, 'head', 'mlm') != 'mlm':
    raise UserError(
        f'this {model.config.family} has head {model.config.head!r}, which tells no words: '  # type: ignore[union-attr]
        'nothing to evaluate on text alone'
    )
  if against is not None:
    check_comparable(model.config, against.config)
  run = functools.partial(
      _batch_sums, dtype=jnp.dtype(dtype),
      first_sentinel=layout.first_sentinel(model.config) if first_sentinel is None
      else first_sentinel,
  )
  sums: dict[str, Any] | None = None
  rows: list[dict[str, Any]] = []
  for batch in batches:
    logits, content, new = run(model.params, dict(batch), config=model.config)
    if against is not None:
      reference, _, known = run(against.params, dict(batch), config=against.config)
      new |= _agreement_sums(logits, reference, content)
      new['reference_content_loss'] = known['content_loss']
    if examples and not rows:
      guesses = np.asarray(jnp.argmax(logits, axis=-1))
      rows = examples_of(
          batch, guesses, model.config.pad_id or 0, examples,
          getattr(model.config, 'causal', True),
      )
    new = jax.device_get(new)
    new = {name: np.asarray(value, np.float64) for name, value in new.items()}
    sums = new if sums is None else {name: sums[name] + new[name] for name in sums}
  if sums is None:
    raise UserError('nothing to evaluate on: the text gives no batch; give a longer text')
  return {**_means(sums), **({'examples': rows} if rows else {})}


def _means(sums: Mapping[str, Any]) -> dict[str, Any]:
  targets = max(float(sums['targets']), 1.0)
  content = max(float(sums['content_targets']), 1.0)
  result: dict[str, Any] = {
      'loss': float(sums['loss']) / targets,
      'accuracy': float(sums['accuracy']) / targets,
      'targets': int(sums['targets']),
      'content_loss': float(sums['content_loss']) / content,
      'content_accuracy': float(sums['content_accuracy']) / content,
      'content_targets': int(sums['content_targets']),
      'routing': {
          name.removeprefix('chosen/'): routing_health(
              chosen, sums[name.replace('chosen/', 'kept/', 1)]
          )
          for name, chosen in sums.items() if name.startswith('chosen/')
      },
  }
  if 'kl' in sums:
    result['agreement'] = {
        'top1': float(sums['top1_agreement']) / content,
        'kl': float(sums['kl']) / content,
        'reference_content_loss': float(sums['reference_content_loss']) / content,
    }
  return result


def examples_of(
    batch: Batch, guesses_bt: np.ndarray, pad_id: int, count: int, causal: bool = True
) -> list[dict[str, list[int]]]:
  """The first rows of a batch: 'encoder' (an encoder-decoder's) or 'tokens' (a decoder's), targets,
  and the most probable token at each target position given the true tokens before it; lists of ids
  without padding. Without `causal` 'tokens' are all that an encoder reads, masked words too."""
  examples = []
  for row in range(min(count, len(guesses_bt))):
    used = np.asarray(batch['weights'][row]) > 0
    if 'encoder_tokens' in batch:
      encoder = np.asarray(batch['encoder_tokens'][row])
      read = {'encoder': encoder[encoder != pad_id].tolist()}
    else:
      seen = used if causal else np.asarray(batch['segments'][row]) > 0
      read = {'tokens': np.asarray(batch['tokens'][row])[seen].tolist()}
    examples.append({
        **read,
        'targets': np.asarray(batch['targets'][row])[used].tolist(),
        'guesses': np.asarray(guesses_bt)[row, used].tolist(),
    })
  return examples
