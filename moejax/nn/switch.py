"""The encoder-decoder of Switch Transformers and T5 as Linen shells.

Layers can be run one at a time (`Layer.attend`, `Layer.feed_forward`), so that a model larger
than memory is walked with one layer's parameters.
"""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moejax import sharding
from moejax.config import EncDecConfig
from moejax.nn import blocks, outputs, stacking
from moejax.nn.layers import Attention, DenseFfn, normal, weight
from moejax.nn.moe import MoeFfn
from moejax.nn.outputs import Output
from moejax.ops import attention, norm
from moejax.ops.activity import Activity
from moejax.ops.cache import Cache
from moejax.ops.linear import linear, tied_logits
from moejax.routing.types import Routing


class Layer(nn.Module):
  """One encoder or decoder layer: attention(s), then a dense or sparse FFN."""

  config: EncDecConfig
  stack: str
  sparse: bool
  mesh: Mesh | None = None
  train: bool = False
  observe: bool = False

  def setup(self):
    if self.stack == 'encoder':
      self.attention = Attention(self.config, self.train)
    else:
      self.self_attention = Attention(self.config, self.train)
      self.cross_attention = Attention(self.config, self.train)
    self.ffn: Any = (
        MoeFfn(self.config, self.mesh, self.train)
        if self.sparse else DenseFfn(self.config, self.train, self.observe)
    )

  def attend(
      self,
      x: jax.Array,
      bias: jax.Array,
      source_bsd: jax.Array | None = None,
      source_bias: jax.Array | None = None,
  ) -> jax.Array:
    """Everything before the feed-forward block."""
    if self.stack == 'encoder':
      return self.attention(x, bias)
    x = self.self_attention(x, bias)
    return self.cross_attention(x, source_bias, source_bsd)

  def step(
      self, x: jax.Array, bias: jax.Array, cache: Cache, at: jax.Array | int, source: Cache,
      source_bias: jax.Array | None,
  ) -> tuple[jax.Array, Cache]:
    """A decoder layer on tokens that come after those in its cache."""
    x, cache = self.self_attention.extend(x, bias, cache, at)
    x = self.cross_attention.look(x, source_bias, source)
    return self.feed_forward(x)[0], cache

  def source_keys(self, source_bsd: jax.Array) -> Cache:
    """What this decoder layer's cross-attention keeps of the encoder's output."""
    return self.cross_attention.keys_of(source_bsd)

  def feed_forward(
      self, x: jax.Array, valid: jax.Array | None = None
  ) -> tuple[jax.Array, Routing | Activity | None]:
    return self.ffn(x, valid)

  def route(self, x: jax.Array, valid: jax.Array | None = None) -> tuple[jax.Array, Routing]:
    """The normed input of this sparse layer's experts and its routing."""
    return self.ffn.route(x, valid)

  def __call__(self, x, bias, source_bsd=None, source_bias=None, valid=None):
    x = self.attend(x, bias, source_bsd, source_bias)
    x, routing = self.feed_forward(x, valid)
    return sharding.constrain_batch(x, self.mesh), routing


class Stack(nn.Module):
  """Layers under one relative position bias, closed by a norm."""

  config: EncDecConfig
  stack: str
  mesh: Mesh | None = None
  train: bool = False
  remat: bool = False
  keep_states: bool = False
  observe: bool = False

  def setup(self):
    c = self.config
    count = c.num_layers if self.stack == 'encoder' else c.num_decoder_layers
    sparse = c.sparse_layers(self.stack)
    layer = nn.remat(Layer) if self.remat else Layer
    self.layers = [
        layer(
            c.of_layer(self.stack, i), self.stack, i in sparse, self.mesh, self.train, self.observe
        )
        for i in range(count)
    ]
    shape = (c.relative_attention_num_buckets, c.num_heads)
    init = normal(c.initializer_factor * c.d_model**-0.5)
    self.relative_bias = weight(self, 'relative_bias', init, shape)
    self.final_norm = weight(self, 'final_norm', nn.initializers.ones, (c.d_model,))
    self.dropout = nn.Dropout(c.dropout_rate, deterministic=not self.train)

  def bias(self, length: int, mask: jax.Array | None) -> jax.Array:
    """Relative position bias plus mask, float32, broadcastable to [b, n, t, t]."""
    c = self.config
    buckets = attention.relative_buckets(
        length, length, bidirectional=self.stack == 'encoder',
        num_buckets=c.relative_attention_num_buckets,
        max_distance=c.relative_attention_max_distance,
    )
    bias = attention.relative_bias(self.relative_bias.astype(jnp.float32), buckets)[None]
    masked = attention.mask_bias(mask, length, causal=self.stack == 'decoder')
    if masked is None:
      return bias
    shape = jnp.broadcast_shapes(bias.shape, masked.shape)
    return jnp.broadcast_to(bias, shape) + jnp.broadcast_to(masked, shape)

  def finish(self, x: jax.Array) -> jax.Array:
    return self.dropout(norm.rms_norm(x, self.final_norm, self.config.norm_eps))

  def __call__(
      self, x: jax.Array, mask: jax.Array | None, source_bsd=None, source_mask=None
  ) -> tuple[jax.Array, dict[str, Routing], jax.Array | None]:
    """Final hidden states, routings by path and, if they are kept, all layers' states."""
    x = self.dropout(x)
    bias = self.bias(x.shape[1], mask)
    source_bias = attention.mask_bias(source_mask, x.shape[1], causal=False)
    context = (bias, source_bsd, source_bias, mask)
    if self.has_variable('params', stacking.BLOCKS):
      x, routings, states = self._run_blocks(x, context)
      x = self.finish(x)
      return x, routings, None if states is None else states.at[-1].set(x)
    routings, given = {}, []
    for i, layer in enumerate(self.layers):
      x, routing = layer(x, *context)
      if routing is not None:
        routings[f'{self.stack}/layers_{i}/ffn'] = routing
      given.append(x)
    x = self.finish(x)
    return x, routings, jnp.stack([*given[:-1], x]) if self.keep_states else None

  def _run_blocks(self, x: jax.Array, context: Any) -> Any:
    """The layers where their params are stacked; each draws from a key of its number."""
    c = self.config
    sparse = c.sparse_layers(self.stack)

    def run(j, params, x, context, key):
      own = c.of_layer(self.stack, j)
      layer: Any = Layer(
          own, self.stack, j in sparse, self.mesh, self.train, self.observe, parent=None
      )
      return layer.apply({'params': params}, x, *context, rngs=blocks.layer_keys(key))

    key = self.make_rng('dropout') if self.train else None
    x, routings, states = blocks.scan(
        stacking.period(c, self.stack), self.get_variable('params', stacking.BLOCKS), x, context,
        key, run, remat=self.remat, keep_states=self.keep_states,
    )
    return x, blocks.by_path(c, routings, self.stack), states


class Shared(nn.Module):
  """The token embedding, used by both stacks and, if tied, by the head."""

  config: EncDecConfig

  def setup(self):
    shape = (self.config.vocab_size, self.config.d_model)
    self.embedding = weight(self, 'embedding', normal(self.config.initializer_factor), shape)

  def __call__(self, tokens: jax.Array, dtype, mesh: Mesh | None = None) -> jax.Array:
    return sharding.gather_whole(self.embedding.astype(dtype), mesh)[tokens]


class Head(nn.Module):
  """Untied output projection."""

  config: EncDecConfig

  def setup(self):
    c = self.config
    init = normal(c.initializer_factor * c.d_model**-0.5)
    self.kernel = weight(self, 'kernel', init, (c.d_model, c.vocab_size))

  def __call__(self) -> jax.Array:
    return self.kernel


class SwitchTransformer(nn.Module):
  """Encoder-decoder over tokens; `config.moe` decides which layers hold experts."""

  config: EncDecConfig
  mesh: Mesh | None = None
  train: bool = False
  remat: bool = False
  dtype: jnp.dtype = jnp.float32
  keep_states: bool = False
  observe: bool = False

  def setup(self):
    args = (self.mesh, self.train, self.remat, self.keep_states, self.observe)
    self.shared = Shared(self.config)
    self.encoder = Stack(self.config, 'encoder', *args)
    self.decoder = Stack(self.config, 'decoder', *args)
    if not self.config.tie_embeddings:
      self.lm_head = Head(self.config)

  def embed(self, tokens: jax.Array) -> jax.Array:
    return sharding.constrain_batch(self.shared(tokens, self.dtype, self.mesh), self.mesh)

  def logits(self, x_btd: jax.Array) -> jax.Array:
    """Tied: hidden * d^-0.5 times the embedding (T5 folds the scale here); untied: the head."""
    if self.config.tie_embeddings:
      x_btd = x_btd * jnp.asarray(self.config.d_model**-0.5, x_btd.dtype)
      return tied_logits(x_btd, self.shared.embedding)
    return linear(x_btd, self.lm_head(), preferred=jnp.float32)

  def __call__(self, encoder_tokens, decoder_tokens, encoder_mask=None, decoder_mask=None):
    encoded, routings, of_source = self.encoder(self.embed(encoder_tokens), encoder_mask)
    decoded, decoder_routings, of_target = self.decoder(
        self.embed(decoder_tokens), decoder_mask, encoded, encoder_mask
    )
    states = None
    if of_source is not None and of_target is not None:
      states = {'encoder': of_source, 'decoder': of_target}
    routings |= decoder_routings
    told = outputs.of_ffns(routings, self.observe)
    return Output(self.logits(decoded), encoder_bsd=encoded, states=states, **told)


def forward(
    config: EncDecConfig,
    params: Any,
    encoder_tokens: jax.Array,
    decoder_tokens: jax.Array,
    *,
    encoder_mask: jax.Array | None = None,
    decoder_mask: jax.Array | None = None,
    key: jax.Array | None = None,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    remat: bool = False,
    keep_states: bool = False,
    observe: bool = False,
) -> Output:
  """Logits of every decoder position; see `moejax.model.apply_fn`.

  params may be stacked (`stacking.stack`): the same result, dropout and jitter apart, whose draws
  then come from other keys.
  """
  rngs = None
  if key is not None:
    rngs = {'dropout': jax.random.fold_in(key, 0), 'router': jax.random.fold_in(key, 1)}
  output: Any = SwitchTransformer(
      config, mesh, key is not None, remat, dtype, keep_states, observe
  ).apply(
      {'params': params}, encoder_tokens, decoder_tokens, encoder_mask, decoder_mask, rngs=rngs
  )
  return output


@functools.partial(jax.jit, static_argnames=('config',))
def init(config: EncDecConfig, key: jax.Array) -> Any:
  """Random float32 params, T5's initialisation."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  return SwitchTransformer(config).init(key, tokens, tokens)['params']
