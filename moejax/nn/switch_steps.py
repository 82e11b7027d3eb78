"""A Switch Transformer or T5 one decoder token at a time: encode once, then step with a cache."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moejax.config import EncDecConfig
from moejax.nn.switch import Layer, SwitchTransformer
from moejax.ops import attention, norm
from moejax.ops import cache as cache_lib
from moejax.ops.linear import linear, tied_logits


def encode(
    config: EncDecConfig, params: Mapping[str, Any], tokens_bs: jax.Array, mask_bs: jax.Array,
    dtype: Any = jnp.float32, mesh: Mesh | None = None,
) -> jax.Array:
  """The encoder's final hidden states, [b, s, d]."""

  def run(model: SwitchTransformer) -> jax.Array:
    return model.encoder(model.embed(tokens_bs), mask_bs)[0]

  module = SwitchTransformer(config, mesh, dtype=jnp.dtype(dtype))
  encoded: Any = module.apply({'params': params}, method=run)
  return encoded


def _layer(config: EncDecConfig, index: int, mesh: Mesh | None) -> Any:
  own = config.of_layer('decoder', index)
  return Layer(own, 'decoder', index in config.sparse_layers('decoder'), mesh)


def source_keys(
    config: EncDecConfig, params: Mapping[str, Any], encoded_bsd: jax.Array
) -> tuple[cache_lib.Cache, ...]:
  """Keys and values of every decoder layer's cross-attention."""
  return tuple(
      _layer(config, i, None).apply(
          {'params': params['decoder'][f'layers_{i}']}, encoded_bsd, method='source_keys'
      )
      for i in range(config.num_decoder_layers)
  )


def empty_caches(
    config: EncDecConfig, batch: int, slots: int, dtype: Any = jnp.float32
) -> tuple[cache_lib.Cache, ...]:
  """A self-attention cache of zeros for each decoder layer."""
  return tuple(
      cache_lib.empty(batch, slots, config.num_heads, config.d_kv, dtype)
      for _ in range(config.num_decoder_layers)
  )


def relative_row(
    config: EncDecConfig, table_bn: jax.Array, slots: int, at: jax.Array | int
) -> jax.Array:
  """Bias of a query in slot `at` against every slot, later ones masked: float32 [1, n, 1, slots].
  """
  buckets = attention.relative_buckets(
      slots, 1, bidirectional=False, num_buckets=config.relative_attention_num_buckets,
      max_distance=config.relative_attention_max_distance,
  )[:, 0]
  distance = at - jnp.arange(slots)
  by_distance_sn = table_bn.astype(jnp.float32)[buckets]
  row_ns = by_distance_sn[jnp.clip(distance, 0, slots - 1)].T
  return jnp.where((distance >= 0)[None], row_ns, attention.MASKED)[None, :, None, :]


def step(
    config: EncDecConfig,
    params: Mapping[str, Any],
    tokens_b1: jax.Array,
    caches: Sequence[cache_lib.Cache],
    at: jax.Array | int,
    *,
    source: Sequence[cache_lib.Cache],
    source_mask_bs: jax.Array,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, tuple[cache_lib.Cache, ...]]:
  """Runs the token of slot `at` of every row; returns the logits that follow it, [b, v].

  Args:
    caches: self-attention's; see `empty_caches`. source: `source_keys`. source_mask_bs: True for
      real encoder tokens.
  """
  stack = params['decoder']
  x = params['shared']['embedding'].astype(dtype)[tokens_b1]
  bias = relative_row(config, stack['relative_bias'], caches[0].k_bsgh.shape[1], at)
  source_bias = attention.mask_bias(source_mask_bs, 1, causal=False)
  new = []
  for i in range(config.num_decoder_layers):
    x, cache = _layer(config, i, mesh).apply(
        {'params': stack[f'layers_{i}']}, x, bias, caches[i], at, source[i], source_bias,
        method='step',
    )
    new.append(cache)
  x = norm.rms_norm(x[:, -1], stack['final_norm'], config.norm_eps)
  if config.tie_embeddings:
    x = x * jnp.asarray(config.d_model**-0.5, x.dtype)
    return tied_logits(x, params['shared']['embedding']), tuple(new)
  return linear(x, params['lm_head']['kernel'], preferred=jnp.float32), tuple(new)
