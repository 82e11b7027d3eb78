"""Hidden states of all samples in one host buffer, walked layer by layer (QMoE section 3.2.1).

Every function here runs one layer with that layer's parameters, on padded batches of a few static
shapes; the buffer itself is flat, [tokens, d], without padding.
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import tree
from moejax.compress import samples as samples_lib
from moejax.config import ModelConfig
from moejax.nn.switch import Layer, Stack
from moejax.ops import attention, ffn, norm
from moejax.ops.linear import linear

Params = Mapping[str, Any]
_ROWS = 2048


@functools.partial(jax.jit, static_argnames=('config', 'stack', 'kind'))
def _layer(config, stack, kind, params, stack_params, x, mask, source, source_mask):
  """'dense': the whole layer. 'sparse': up to the experts; then their routing as well."""
  bias = Stack(config, stack).apply({'params': stack_params}, x.shape[1], mask, method='bias')
  source_bias = attention.mask_bias(source_mask, x.shape[1], causal=False)
  layer = Layer(config, stack, kind == 'sparse')
  own = {'params': params}
  x = layer.apply(own, x, bias, source, source_bias, method='attend')
  if kind == 'dense':
    return layer.apply(own, x, mask, method='feed_forward')[0], None
  _, routing = layer.apply(own, x, mask, method='route')
  return x, (routing.choice_mk, routing.gate_mk, routing.keep_mk)


@functools.partial(jax.jit, static_argnames=('eps',))
def _norm(x, scale, eps):
  return norm.rms_norm(x, scale, eps)


@functools.partial(jax.jit, static_argnames=('activation',))
def _expert(weights_df, x_md, activation):
  return ffn.dense_ffn(weights_df, x_md, activation)


class Activations:
  """The hidden states of one stack; see the module."""

  def __init__(
      self, config: ModelConfig, stack: str, samples: samples_lib.Samples,
      batches: list[samples_lib.Batch], stack_params: Params, embedding: np.ndarray,
      source: 'Activations | None' = None,
  ):
    """Embeds the tokens of every sample.

    Args:
      config: the model's. stack: 'encoder' or 'decoder'. samples, batches: see `samples`.
      stack_params: relative_bias and final_norm. embedding: [v, d].
      source: the finished encoder, for a decoder.
    """
    tokens = np.concatenate([getattr(s, stack) for s in samples.samples])
    self.config, self.stack, self.batches, self.source = config, stack, batches, source
    self.stack_params = {k: jnp.asarray(v) for k, v in stack_params.items()}
    self.buffer = np.asarray(embedding[tokens], np.float32)
    self.routing: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    self._norm_scale: Any = None

  def _gather(self, index: np.ndarray) -> jax.Array:
    return jnp.asarray(np.where(index[..., None] >= 0, self.buffer[np.maximum(index, 0)], 0.0))

  def run_layer(self, params: Params, *, sparse: bool) -> None:
    """A dense layer whole; a sparse one up to its experts, keeping each token's routing."""
    params = jax.tree.map(jnp.asarray, params)
    routed: dict[str, np.ndarray] = {}
    for batch in self.batches:
      index = getattr(batch, self.stack)
      source = source_mask = None
      if self.source is not None:
        source, source_mask = self.source._gather(batch.encoder), jnp.asarray(batch.encoder >= 0)
      x, routing = _layer(
          self.config, self.stack, 'sparse' if sparse else 'dense', params, self.stack_params,
          self._gather(index), jnp.asarray(index >= 0), source, source_mask,
      )
      real = index >= 0
      self.buffer[index[real]] = np.asarray(x)[real]
      if routing is not None:
        for name, a in zip(('choice', 'gate', 'keep'), routing):
          a = np.asarray(a)
          flat = routed.setdefault(name, np.zeros((len(self.buffer), a.shape[-1]), a.dtype))
          flat[index[real]] = a.reshape(*index.shape, -1)[real]
    if sparse:
      self.routing = routed['choice'], routed['gate'], routed['keep']
      self._norm_scale = jnp.asarray(tree.get(params, 'ffn/norm'))
      self._before = self.buffer if routed['choice'].shape[1] == 1 else self.buffer.copy()

  def tokens_of(self, expert: int) -> np.ndarray:
    """The tokens that go to an expert, in order."""
    assert self.routing is not None
    choice, _, keep = self.routing
    return np.flatnonzero(((choice == expert) & keep).any(1))

  def expert_inputs(self, tokens: np.ndarray) -> np.ndarray:
    """Normed inputs of the experts, float32 [m, d]."""
    out = np.empty((len(tokens), self.buffer.shape[1]), np.float32)
    for start in range(0, len(tokens), _ROWS):
      piece = tokens[start : start + _ROWS]
      x = _pad_rows(self._before[piece])
      normed = _norm(jnp.asarray(x), self._norm_scale, self.config.norm_eps)
      out[start : start + len(piece)] = np.asarray(normed)[: len(piece)]
    return out

  def run_expert(self, expert: int, weights_df: Mapping[str, np.ndarray]) -> None:
    """Adds gate * expert(norm(x)) to every token of one expert."""
    assert self.routing is not None
    choice, gate, keep = self.routing
    tokens = self.tokens_of(expert)
    if not tokens.size:
      return
    own = {name: jnp.asarray(w) for name, w in weights_df.items()}
    factor = np.where((choice[tokens] == expert) & keep[tokens], gate[tokens], 0.0).sum(1)
    for start in range(0, len(tokens), _ROWS):
      piece = tokens[start : start + _ROWS]
      x = _pad_rows(self.expert_inputs(piece))
      y = np.asarray(_expert(own, jnp.asarray(x), self.config.activation))[: len(piece)]
      self.buffer[piece] += factor[start : start + len(piece), None].astype(np.float32) * y

  def finish(self) -> None:
    """The stack's final norm."""
    scale = self.stack_params['final_norm']
    for start in range(0, len(self.buffer), _ROWS):
      piece = self.buffer[start : start + _ROWS]
      normed = _norm(jnp.asarray(_pad_rows(piece)), scale, self.config.norm_eps)
      self.buffer[start : start + len(piece)] = np.asarray(normed)[: len(piece)]


def _pad_rows(x_md: np.ndarray) -> np.ndarray:
  rows = min(_ROWS, max(16, 1 << (len(x_md) - 1).bit_length()))
  return np.pad(x_md, ((0, rows - len(x_md)), (0, 0)))


@functools.partial(jax.jit, static_argnames=('scale',))
def _token_losses(x_md, head_dv, targets_m, scale):
  logits = linear(x_md * scale, head_dv, preferred=jnp.float32)
  return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(
      logits, targets_m[:, None], axis=-1
  )[:, 0]


def token_losses(
    config: ModelConfig, hidden_md: np.ndarray, head_dv: Any, targets_m: np.ndarray
) -> np.ndarray:
  """Cross-entropy of each position in nats, float32 [m], from finished decoder states."""
  scale = config.d_model**-0.5 if config.tie_embeddings else 1.0
  out = np.empty(len(hidden_md), np.float32)
  rows = 512
  for start in range(0, len(hidden_md), rows):
    x, targets = hidden_md[start : start + rows], targets_m[start : start + rows]
    pad = rows - len(x)
    losses = _token_losses(
        jnp.asarray(np.pad(x, ((0, pad), (0, 0)))), head_dv, jnp.asarray(np.pad(targets, (0, pad))),
        scale,
    )
    out[start : start + len(x)] = np.asarray(losses)[: len(x)]
  return out
