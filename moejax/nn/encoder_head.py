"""What an encoder tells of its hidden states: masked words, or the label of a text (BERT)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config import EncoderConfig
from moejax.ops import ffn, norm
from moejax.ops.linear import linear, tied_logits


def pooled(params: Mapping[str, Any], x_btd: jax.Array) -> jax.Array:
  """BERT's pooler, tanh of a product, at every place; a text's is that of its first token."""
  own = params['pooler']
  y = linear(x_btd, own['kernel']) + own['bias'].astype(x_btd.dtype)[None, None]
  return jnp.tanh(y)


def logits(config: EncoderConfig, params: Mapping[str, Any], x_btd: jax.Array) -> jax.Array:
  """Of words, float32 [b, t, v]; of labels [b, t, labels], a text's at its first token.

  Empty, [b, t, 0], for head 'none'.
  """
  if config.head == 'none':
    return jnp.zeros((*x_btd.shape[:2], 0), jnp.float32)
  own = params['head']
  if config.head == 'labels':
    y = linear(pooled(params, x_btd), own['kernel'], preferred=jnp.float32)
  else:
    y = linear(x_btd, own['transform']) + own['transform_bias'].astype(x_btd.dtype)[None, None]
    y = ffn.hidden_units(config.words_activation, y)
    y = norm.layer_norm(y, own['norm'], own['norm_bias'], config.norm_eps)
    y = tied_logits(y, params['shared']['embedding'])
  return y + own['bias'].astype(jnp.float32)[None, None]


def init(config: EncoderConfig, key: jax.Array) -> dict[str, Any]:
  """Random float32 params of pooler and head."""
  d, params = config.d_model, dict[str, Any]()
  draw = lambda n, shape: config.initializer_std * jax.random.normal(
      jax.random.fold_in(key, n), shape, jnp.float32
  )
  if config.pools:
    params['pooler'] = {'kernel': draw(0, (d, d)), 'bias': jnp.zeros((d,))}
  if config.head == 'labels':
    params['head'] = {
        'kernel': draw(1, (d, config.labels)), 'bias': jnp.zeros((config.labels,))
    }
  elif config.head == 'mlm':
    params['head'] = {
        'transform': draw(1, (d, d)), 'transform_bias': jnp.zeros((d,)), 'norm': jnp.ones((d,)),
        'norm_bias': jnp.zeros((d,)), 'bias': jnp.zeros((config.vocab_size,)),
    }
  return params
