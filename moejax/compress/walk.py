"""One layer at a time, for either architecture: what a walk through a model does with its params.

Each function takes the params of one layer and those outside of layers (`outer`), so a model larger
than memory is walked with one layer's weights.
"""

from collections.abc import Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import EncoderConfig, ModelConfig, StackConfig
from moejax.nn import decoder
from moejax.nn.switch import Layer, Stack
from moejax.ops import attention, norm
from moejax.ops.linear import linear

Params = Mapping[str, Any]


class Routed(NamedTuple):
  """Where tokens go among the experts that the layer holds, [m, k]; logits [m, e] of its router."""

  choice: Any
  gate: Any
  keep: Any
  logits: Any


def outer_paths(config: ModelConfig, paths: tuple[str, ...]) -> tuple[str, ...]:
  """The paths of weights that belong to no layer."""
  del config
  return tuple(path for path in paths if '/layers_' not in path)


def embed(
    config: ModelConfig, outer: Params, tokens: np.ndarray, positions: np.ndarray
) -> np.ndarray:
  """Input of the first layer for flat tokens, float32 [m, d]."""
  shared = outer['shared']
  x = np.asarray(shared['embedding'][tokens], np.float32)
  if isinstance(config, StackConfig) and config.rope is None:
    x = x + np.asarray(shared['positions'][positions + config.position_offset], np.float32)
  if isinstance(config, EncoderConfig):
    x = x + np.asarray(shared['token_types'][0], np.float32)[None]
    x = np.array(_norm(jnp.asarray(x), shared['norm'], shared['norm_bias'], config.norm_eps))
  return x


def layer(
    config: ModelConfig, stack: str, index: int, params: Params, stack_params: Params,
    x: jax.Array, mask: jax.Array, source: jax.Array | None, source_mask: jax.Array | None,
) -> tuple[jax.Array, Routed | None, jax.Array | None]:
  """A dense layer whole; a sparse one up to its experts.

  Args:
    params: of the layer, without its experts. stack_params: `outer[stack]`.
    x: [b, t, d], right-padded. mask: True for real tokens. source, source_mask: the encoder's.

  Returns:
    (x, where its tokens go or None, what the layer adds beside its experts or None).
  """
  sparse = index in config.sparse_layers(stack)
  if isinstance(config, StackConfig):
    return _decoder_layer(config, _first_alike(config, index), params, x, mask)
  kind = 'sparse' if sparse else 'dense'
  return _encdec_layer(
      config.of_layer(stack, index), stack, kind, params, stack_params, x, mask, source, source_mask
  )


@functools.partial(jax.jit, static_argnames=('config', 'stack', 'kind'))
def _encdec_layer(config, stack, kind, params, stack_params, x, mask, source, source_mask):
  bias = Stack(config, stack).apply({'params': stack_params}, x.shape[1], mask, method='bias')
  source_bias = attention.mask_bias(source_mask, x.shape[1], causal=False)
  shell = Layer(config, stack, kind == 'sparse')
  own = {'params': params}
  x = shell.apply(own, x, bias, source, source_bias, method='attend')
  if kind == 'dense':
    return shell.apply(own, x, mask, method='feed_forward')[0], None, None
  return x, *_routed(shell, own, x, mask)


@functools.partial(jax.jit, static_argnames=('config', 'index'))
def _decoder_layer(config, index, params, x, mask):
  length = x.shape[1]
  positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], mask.shape)
  context = decoder.make_context(
      config, positions, positions, length=length, valid_bt=mask, in_order=True
  )
  shell, own = decoder.layer_module(config, index), {'params': params}
  x, _ = shell.apply(own, x, context, method='attend')
  if not shell.sparse:
    return shell.apply(own, x, context, method='feed_forward')[0], None, None
  return x, *_routed(shell, own, x, context)


def route(
    config: ModelConfig, stack: str, index: int, params: Params, x: jax.Array, mask: jax.Array
) -> tuple[Routed, jax.Array | None]:
  """Where the tokens of a sparse layer go, x being what `layer` returns before its experts.

  And what the layer adds beside its experts, or None. A layer that chooses by its experts' own
  activations needs them in its params.
  """
  if isinstance(config, StackConfig):
    return _decoder_route(config, _first_alike(config, index), params, x, mask)
  return _encdec_route(config.of_layer(stack, index), stack, params, x, mask)


@functools.partial(jax.jit, static_argnames=('config', 'stack'))
def _encdec_route(config, stack, params, x, mask):
  return _routed(Layer(config, stack, True), {'params': params}, x, mask)


@functools.partial(jax.jit, static_argnames=('config', 'index'))
def _decoder_route(config, index, params, x, mask):
  positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], mask.shape)
  context = decoder.make_context(
      config, positions, positions, length=x.shape[1], valid_bt=mask, in_order=True
  )
  return _routed(decoder.layer_module(config, index), {'params': params}, x, context)


def _routed(shell, own, x, context) -> tuple[Routed, jax.Array | None]:
  normed, routing = shell.apply(own, x, context, method='route')
  led = shell.apply(own, routing, method=lambda module, r: module.ffn.lead(r))
  routed = Routed(led.choice_mk, led.gate_mk, led.keep_mk, routing.logits_me)
  beside = shell.apply(own, normed, method=lambda module, y: module.ffn.beside(y))
  return routed, None if isinstance(beside, int) else beside


def _first_alike(config: StackConfig, index: int) -> int:
  """The first layer that compiles to the same program."""
  traits = lambda i: (
      config.window_of(i), i in config.sparse_layers(), config.of_layer(config.stack, i)
  )
  return next(i for i in range(config.num_layers) if traits(i) == traits(index))


def expert_norm(config: ModelConfig, params: Params, x_md: jax.Array) -> jax.Array:
  """The norm before the experts of a layer, if there is one."""
  if config.post_norm:
    return x_md
  return _norm(x_md, params['ffn']['norm'], params['ffn'].get('norm_bias'), config.norm_eps)


def norm_behind(config: ModelConfig, params: Params, x_md: jax.Array) -> jax.Array:
  """What becomes of the residual stream once a layer's experts have been added to it."""
  if not config.post_norm:
    return x_md
  return _norm(x_md, params['ffn']['norm'], params['ffn'].get('norm_bias'), config.norm_eps)


def final_norm(config: ModelConfig, stack_params: Params, x_md: jax.Array) -> jax.Array:
  """A stack's last norm, if there is one."""
  if config.post_norm:
    return x_md
  bias = stack_params.get('final_norm_bias')
  return _norm(x_md, stack_params['final_norm'], bias, config.norm_eps)


@functools.partial(jax.jit, static_argnames=('eps',))
def _norm(x, scale, bias, eps):
  return norm.norm(x, scale, bias, eps)


def token_losses(
    config: ModelConfig, outer: Params, hidden_md: np.ndarray, targets_m: np.ndarray
) -> np.ndarray:
  """Cross-entropy of each position in nats, float32 [m], from finished states of the last stack."""
  if isinstance(config, StackConfig):
    run = functools.partial(_stack_losses, config, _of_head(outer))
  else:
    tied = config.tie_embeddings
    head = np.asarray(outer['shared']['embedding']).T if tied else outer['lm_head']['kernel']
    scale = config.d_model**-0.5 if tied else 1.0
    run = functools.partial(_token_losses, jnp.asarray(head, jnp.float32), scale)
  out, rows = np.empty(len(hidden_md), np.float32), 512
  for start in range(0, len(hidden_md), rows):
    x, targets = hidden_md[start : start + rows], targets_m[start : start + rows]
    pad = rows - len(x)
    losses = run(
        jnp.asarray(np.pad(x, ((0, pad), (0, 0)))), jnp.asarray(np.pad(targets, (0, pad)))
    )
    out[start : start + len(x)] = np.asarray(losses)[: len(x)]
  return out


def _of_head(outer: Params) -> dict[str, Any]:
  """What a head is computed from, on the device once."""
  names = ('shared', 'lm_head', 'head', 'pooler')
  return jax.tree.map(jnp.asarray, {n: outer[n] for n in names if n in outer})


@functools.partial(jax.jit, static_argnames=('config',))
def _stack_losses(config, outer, x_md, targets_m):
  return _cross_entropy(decoder.head(config, outer, x_md[None])[0], targets_m)


@functools.partial(jax.jit, static_argnames=('scale',))
def _token_losses(head_dv, scale, x_md, targets_m):
  return _cross_entropy(linear(x_md * scale, head_dv, preferred=jnp.float32), targets_m)


def _cross_entropy(logits, targets_m):
  picked = jnp.take_along_axis(logits, targets_m[:, None], axis=-1)[:, 0]
  return jax.nn.logsumexp(logits, axis=-1) - picked
