"""A transformer of one stack, decoder or encoder: Linen shells of layers, composed by functions.

Layers are applied one at a time from their own params, so the same code runs a model whole, layer
by layer from disk, or with a cache.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moejax import sharding
from moejax.config import EncoderConfig, StackConfig
from moejax.errors import UserError
from moejax.nn import blocks, encoder_head, outputs, stacking
from moejax.nn.layers import DenseFfn, norm_after, norm_before, norm_params, normal, weight
from moejax.nn.moe import MoeFfn
from moejax.nn.outputs import Output
from moejax.ops import cache as cache_lib
from moejax.ops import causal, norm, rope
from moejax.ops.activity import Activity
from moejax.ops.linear import linear, tied_logits
from moejax.routing.draws import Draws
from moejax.routing.types import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
  """What all layers share: rotary angles, masks by window, real tokens, their ids.

  turn: cos and sin [b, t, r], or None. masks: bool [b, 1, t, s] by window ('' for no window).
  segment_bt: numbers of the queries' packed documents, or None. draws: a layer's recorded random
  numbers. in_order: see `kernels_pallas.attention.api.attend`.
  """

  turn: tuple[jax.Array, jax.Array] | None
  masks: dict[str, jax.Array]
  valid_bt: jax.Array | None
  tokens_bt: jax.Array | None
  segment_bt: jax.Array | None = None
  draws: Draws | None = None
  in_order: bool = dataclasses.field(default=False, metadata={'static': True})


class SelfAttention(nn.Module):
  """x + dropout(attend(norm(x)))."""

  config: StackConfig
  window: int | None = None
  mesh: Mesh | None = None
  train: bool = False

  @nn.compact
  def __call__(
      self, x_btd: jax.Array, context: Context, cache: cache_lib.Cache | None = None, at: Any = 0
  ) -> tuple[jax.Array, cache_lib.Cache | None]:
    c = self.config
    scale, bias = norm_params(self, c)
    params = self._params()
    q, k, v = causal.project(
        params, norm_before(c, x_btd, scale, bias), context.turn,
        eps=c.norm_eps, clip=c.clip_qkv,
    )
    if cache is not None:
      cache = cache_lib.extend(cache, k, v, at)
      if not context.in_order:  # Else the tokens see one another and nothing older.
        k, v = cache.k_bsgh.astype(q.dtype), cache.v_bsgh.astype(q.dtype)
    mixed = causal.attend(
        q, k, v, context.masks[str(self.window or '')], in_order=context.in_order,
        window=self.window, segment_bt=context.segment_bt, mesh=self.mesh,
    )
    y = causal.output(params, mixed)
    x_btd = x_btd + nn.Dropout(c.dropout_rate, deterministic=not self.train)(y)
    return norm_after(c, x_btd, scale, bias), cache

  def _params(self) -> dict[str, Any]:
    c, zeros, ones = self.config, nn.initializers.zeros, nn.initializers.ones
    d, h = c.d_model, c.d_head
    heads = {'q': c.num_heads, 'k': c.num_kv_heads, 'v': c.num_kv_heads}
    params = {}
    for name, n in heads.items():
      params[name] = weight(self, name, normal(c.init_std(d)), (d, n, h))
      if c.attention_bias:
        params[f'{name}_bias'] = weight(self, f'{name}_bias', zeros, (n, h))
      if c.qk_norm and name != 'v':
        size = h if c.qk_norm == 'head' else n * h
        params[f'{name}_norm'] = weight(self, f'{name}_norm', ones, (size,))
    out = normal(c.init_std(c.num_heads * h))
    params['o'] = weight(self, 'o', out, (c.num_heads, h, d))
    if c.attention_out_bias:
      params['o_bias'] = weight(self, 'o_bias', zeros, (d,))
    return params


class DecoderLayer(nn.Module):
  """Attention, then a dense or sparse FFN."""

  config: StackConfig
  sparse: bool
  window: int | None = None
  mesh: Mesh | None = None
  train: bool = False
  observe: bool = False

  def setup(self):
    self.attention = SelfAttention(self.config, self.window, self.mesh, self.train)
    self.ffn: Any = (
        MoeFfn(self.config, self.mesh, self.train)
        if self.sparse else DenseFfn(self.config, self.train, self.observe)
    )

  def attend(self, x_btd, context, cache=None, at=0):
    """Everything before the feed-forward block, and the cache with what this text adds."""
    return self.attention(x_btd, context, cache, at)

  def feed_forward(self, x_btd, context) -> tuple[jax.Array, Routing | Activity | None]:
    if not self.sparse:
      return self.ffn(x_btd, context.valid_bt)
    return self.ffn(x_btd, context.valid_bt, context.tokens_bt, context.draws)

  def route(self, x_btd, context) -> tuple[jax.Array, Routing]:
    """The normed input of this sparse layer's experts and its routing."""
    return self.ffn.route(x_btd, context.valid_bt, context.tokens_bt)

  def __call__(self, x_btd, context, cache=None, at=0):
    x_btd, cache = self.attend(x_btd, context, cache, at)
    x_btd, routing = self.feed_forward(x_btd, context)
    return sharding.constrain_batch(x_btd, self.mesh), routing, cache


def layer_module(
    config: StackConfig, index: int, mesh: Mesh | None = None, train: bool = False,
    observe: bool = False,
) -> DecoderLayer:
  """The shell of layer `index`."""
  sparse = index in config.sparse_layers()
  return DecoderLayer(
      config.of_layer(config.stack, index), sparse, config.window_of(index), mesh, train, observe
  )


def windows(config: StackConfig) -> set[int | None]:
  """The distinct windows among the layers."""
  return {config.window_of(i) for i in range(config.num_layers)}


def make_context(
    config: StackConfig,
    query_bt: jax.Array,
    key_bs: jax.Array,
    *,
    length: int,
    segments: tuple[jax.Array, jax.Array] | None = None,
    valid_bt: jax.Array | None = None,
    tokens_bt: jax.Array | None = None,
    in_order: bool = False,
) -> Context:
  """Angles and masks of queries at positions query_bt that may see keys at positions key_bs.

  Args:
    length: positions in play, which decides between longrope's factors.
    segments: numbers of packed documents, of queries and of keys.
    valid_bt, tokens_bt: for the router.
    in_order: positions grow with the index, within a document where there are several.
  """
  if not config.causal and segments is None and valid_bt is not None:
    segments = valid_bt.astype(jnp.int32), valid_bt.astype(jnp.int32)
  turn = None
  if config.rope is not None:
    turn = rope.angles(config.rope, config.d_rotated, query_bt, length)
  of_query, of_key = segments if segments is not None else (None, None)
  masks = {
      str(window or ''): causal.mask(
          query_bt, key_bs, window=window, query_segment_bt=of_query, key_segment_bs=of_key,
          causal=config.causal,
      )
      for window in windows(config)
  }
  return Context(
      turn=turn, masks=masks, valid_bt=valid_bt, tokens_bt=tokens_bt, segment_bt=of_query,
      in_order=in_order and config.causal,
  )


def embed(
    config: StackConfig, params: Mapping[str, Any], tokens_bt: jax.Array,
    positions_bt: jax.Array, dtype: Any, mesh: Mesh | None = None,
    types_bt: jax.Array | None = None,
) -> jax.Array:
  """Token embeddings, learned positions and kinds of tokens where the model has them: [b, t, d]."""
  shared = params['shared']
  x_btd = sharding.gather_whole(shared['embedding'].astype(dtype), mesh)[tokens_bt]
  if config.rope is None:
    table = sharding.gather_whole(shared['positions'].astype(dtype), mesh)
    x_btd = x_btd + table[positions_bt + config.position_offset]
  if isinstance(config, EncoderConfig):
    types = jnp.zeros_like(tokens_bt) if types_bt is None else types_bt
    table = sharding.gather_whole(shared['token_types'].astype(dtype), mesh)
    x_btd = norm.norm(x_btd + table[types], shared['norm'], shared['norm_bias'], config.norm_eps)
  return sharding.constrain_batch(x_btd, mesh)


def final_norm(
    config: StackConfig, params: Mapping[str, Any], x_btd: jax.Array
) -> jax.Array:
  if config.post_norm:
    return x_btd
  stack = params[config.stack]
  return norm.norm(x_btd, stack['final_norm'], stack.get('final_norm_bias'), config.norm_eps)


def head(config: StackConfig, params: Mapping[str, Any], x_btd: jax.Array) -> jax.Array:
  """The logits of normed hidden states, float32 [b, t, v]; an encoder's are of what it tells."""
  if isinstance(config, EncoderConfig):
    return encoder_head.logits(config, params, x_btd)
  if config.tie_embeddings:
    logits = tied_logits(x_btd, params['shared']['embedding'])
  else:
    logits = linear(x_btd, params['lm_head']['kernel'], preferred=jnp.float32)
  if config.head_bias:
    logits = logits + params['lm_head']['bias'].astype(jnp.float32)[None, None]
  return logits


def forward(
    config: StackConfig,
    params: Mapping[str, Any],
    tokens_bt: jax.Array,
    *,
    positions_bt: jax.Array | None = None,
    segments_bt: jax.Array | None = None,
    valid_bt: jax.Array | None = None,
    types_bt: jax.Array | None = None,
    draws: Mapping[str, Draws] | None = None,
    key: jax.Array | None = None,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    remat: bool = False,
    microbatches: int = 0,
    keep_states: bool = False,
    observe: bool = False,
) -> Output:
  """Logits of every position; see `moejax.model.apply_fn`.

  params may be stacked (`stacking.stack`); a mesh with a pipeline needs them to be.
  """
  batch, length = tokens_bt.shape
  in_order = positions_bt is None or segments_bt is not None
  if positions_bt is None:
    positions_bt = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
  context = make_context(
      config, positions_bt, positions_bt, length=length,
      segments=None if segments_bt is None else (segments_bt, segments_bt),
      valid_bt=valid_bt, tokens_bt=tokens_bt, in_order=in_order,
  )
  x_btd = embed(config, params, tokens_bt, positions_bt, dtype, mesh, types_bt)
  if key is not None and isinstance(config, EncoderConfig):
    drop = nn.Dropout(config.dropout_rate, deterministic=False)
    x_btd = drop.apply({}, x_btd, rngs={'dropout': jax.random.fold_in(key, config.num_layers)})
  if draws and stacking.is_stacked(params):
    raise UserError('recorded draws are of single layers: unstack the params')
  if stacking.is_stacked(params):
    x_btd, routings, states = run_blocks(
        config, params[config.stack], x_btd, context, key, mesh, remat, microbatches, keep_states,
        observe,
    )
  elif mesh is not None and mesh.shape['pipeline'] > 1:
    raise UserError('a mesh with a pipeline needs stacked layers: set train.scan_layers = true')
  else:
    x_btd, routings, states = run_layers(
        config, params[config.stack], x_btd, context, key, mesh, remat, draws or {}, keep_states,
        observe,
    )
  x_btd = final_norm(config, params, x_btd)
  kept = None if states is None else {config.stack: states.at[-1].set(x_btd)}
  told = outputs.of_ffns(routings, observe)
  encoded = x_btd if isinstance(config, EncoderConfig) else None
  return Output(head(config, params, x_btd), encoder_bsd=encoded, states=kept, **told)


def run_layers(
    config, stack, x_btd, context, key, mesh, remat, draws, keep_states=False, observe=False
):
  """All layers in turn: hidden states before the last norm, routings by path, all states or None.

  States are what each layer gives, [layers, b, t, d].
  """
  routings, given = {}, []
  for i in range(config.num_layers):
    module = layer_module(config, i, mesh, key is not None, observe)
    own = dataclasses.replace(context, draws=draws.get(f'{config.stack}/layers_{i}/ffn'))
    run = lambda p, x, k, module=module, own=own: module.apply(
        {'params': p}, x, own, rngs=blocks.layer_keys(k)
    )[:2]
    run = jax.checkpoint(run) if remat else run
    x_btd, routing = run(
        stack[f'layers_{i}'], x_btd, None if key is None else jax.random.fold_in(key, i)
    )
    if routing is not None:
      routings[f'{config.stack}/layers_{i}/ffn'] = routing
    given.append(x_btd)
  return x_btd, routings, jnp.stack(given) if keep_states else None


def run_blocks(
    config, stack, x_btd, context, key, mesh, remat, microbatches=0, keep_states=False,
    observe=False,
):
  """`run_layers` for stacked layers: a scan, or a pipeline where the mesh has stages."""

  def run(j, params, x, context, key):
    module: Any = layer_module(config, j, mesh, key is not None, observe)
    return module.apply({'params': params}, x, context, rngs=blocks.layer_keys(key))[:2]

  own = stack[stacking.BLOCKS]
  stages = 1 if mesh is None else mesh.shape['pipeline']
  if stages == 1:
    step = stacking.period(config)
    x_btd, routings, states = blocks.scan(
        step, own, x_btd, context, key, run, remat=remat, keep_states=keep_states
    )
  elif keep_states or observe:
    what = 'hidden states are not kept' if keep_states else 'activity is not measured'
    raise UserError(f'{what} over a pipeline: set mesh.pipeline = 1')
  else:
    states = None
    x_btd, routings = blocks.pipeline(
        config, own, x_btd, context, key, run, mesh=mesh, microbatches=microbatches or stages,
        remat=remat,
    )
  return x_btd, blocks.by_path(config, routings, config.stack), states


def empty_caches(
    config: StackConfig, batch: int, slots: int, dtype: Any = jnp.float32
) -> tuple[cache_lib.Cache, ...]:
  """A cache of zeros for each layer, for texts of up to `slots` tokens."""
  return tuple(
      cache_lib.empty(batch, slots, config.num_kv_heads, config.d_head, dtype)
      for _ in range(config.num_layers)
  )


def step(
    config: StackConfig,
    params: Mapping[str, Any],
    tokens_bt: jax.Array,
    caches: Sequence[cache_lib.Cache],
    at: jax.Array | int,
    *,
    positions_bt: jax.Array,
    key_positions_bs: jax.Array | None,
    length: int,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, tuple[cache_lib.Cache, ...]]:
  """Runs tokens that come after those in the caches; returns logits of the last one, [b, v].

  Args:
    tokens_bt: one token, or a prompt, of each row. caches: of all layers; see `empty_caches`.
    at: the first slot to write.
    positions_bt: of the tokens. key_positions_bs: of every slot; one past any query hides it. None
      where the caches are empty: the tokens see one another, and what has a position below 0, which
      is padding in front of them, is not seen.
    length: see `make_context`.
  """
  if key_positions_bs is None:
    real_bt = (positions_bt >= 0).astype(jnp.int32)
    context = make_context(
        config, positions_bt, positions_bt, length=length, segments=(real_bt, real_bt),
        tokens_bt=tokens_bt, in_order=True,
    )
  else:
    context = make_context(
        config, positions_bt, key_positions_bs, length=length, tokens_bt=tokens_bt
    )
  x_btd = embed(config, params, tokens_bt, jnp.maximum(positions_bt, 0), dtype, mesh)
  new = []
  for i in range(config.num_layers):
    run: Any = layer_module(config, i, mesh).apply
    own = {'params': params[config.stack][f'layers_{i}']}
    x_btd, _, cache = run(own, x_btd, context, caches[i], at)
    new.append(cache)
  x_btd = final_norm(config, params, x_btd[:, -1:])
  return head(config, params, x_btd)[:, 0], tuple(new)


@functools.partial(jax.jit, static_argnames=('module',))
def _init_layer(module: DecoderLayer, key: jax.Array) -> Any:
  """Params of a layer; layers that are alike share one program."""
  positions = jnp.zeros((1, 2), jnp.int32)
  context = make_context(module.config, positions, positions, length=2, tokens_bt=positions)
  return module.init(key, jnp.zeros((1, 2, module.config.d_model)), context)['params']


def init(config: StackConfig, key: jax.Array) -> dict[str, Any]:
  """Random float32 params."""
  keys = jax.random.split(key, config.num_layers + 3)
  std, d, v = config.initializer_std, config.d_model, config.vocab_size
  table = lambda k, shape: std * jax.random.normal(k, shape, jnp.float32)
  shared = {'embedding': table(keys[0], (v, d))}
  if config.rope is None:
    shared['positions'] = table(keys[1], (config.max_positions + config.position_offset, d))
  stack: dict[str, Any] = {
      f'layers_{i}': _init_layer(layer_module(config, i), keys[3 + i])
      for i in range(config.num_layers)
  }
  if isinstance(config, EncoderConfig):
    shared |= {
        'token_types': table(jax.random.fold_in(keys[0], 1), (config.token_types, d)),
        'norm': jnp.ones((d,)), 'norm_bias': jnp.zeros((d,)),
    }
    return {'shared': shared, config.stack: stack, **encoder_head.init(config, keys[2])}
  stack['final_norm'] = jnp.ones((d,))
  if config.norm == 'layer':
    stack['final_norm_bias'] = jnp.zeros((d,))
  params: dict[str, Any] = {'shared': shared, config.stack: stack}
  if not config.tie_embeddings:
    params['lm_head'] = {'kernel': table(keys[2], (d, v))}
  if config.head_bias:
    params.setdefault('lm_head', {})['bias'] = jnp.zeros((v,))
  return params
