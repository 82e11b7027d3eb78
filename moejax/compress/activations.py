"""Hidden states of all samples in one host buffer, walked layer by layer (QMoE section 3.2.1).

One layer runs with its own parameters, on padded batches of a few static shapes (`walk`); the
buffer itself is flat, [tokens, d], without padding.
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import tree
from moejax.compress import samples as samples_lib
from moejax.compress import walk
from moejax.config import ModelConfig
from moejax.ops import ffn

_ROWS = 2048


@functools.partial(jax.jit, static_argnames=('activation',))
def _expert(weights_df, x_md, activation):
  return ffn.dense_ffn(weights_df, x_md, activation)


class Activations:
  """The hidden states of one stack; see the module."""

  def __init__(
      self, config: ModelConfig, stack: str, samples: samples_lib.Samples,
      batches: list[samples_lib.Batch], outer: walk.Params, source: 'Activations | None' = None,
  ):
    """Embeds the tokens of every sample.

    Args:
      config: the model's. stack: one of its stacks. samples, batches: see `samples`.
      outer: the params outside of layers.
      source: the finished encoder, for a decoder behind one.
    """
    own = [s.tokens[stack] for s in samples.samples]
    tokens, positions = np.concatenate(own), np.concatenate([np.arange(len(t)) for t in own])
    self.config, self.stack, self.batches, self.source = config, stack, batches, source
    self.stack_params = jax.tree.map(jnp.asarray, dict(outer[stack]))
    self.buffer = walk.embed(config, outer, tokens, positions)
    self.routing: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    self._layer_params: Any = None

  def _gather(self, index: np.ndarray) -> jax.Array:
    return jnp.asarray(np.where(index[..., None] >= 0, self.buffer[np.maximum(index, 0)], 0.0))

  def run_layer(self, index: int, params: walk.Params) -> None:
    """A dense layer whole; a sparse one up to its experts, keeping each token's routing."""
    params = jax.tree.map(jnp.asarray, params)
    routed: dict[str, np.ndarray] = {}
    added: np.ndarray | None = None
    for batch in self.batches:
      place = batch.index[self.stack]
      source = source_mask = None
      if self.source is not None:
        there = batch.index[self.source.stack]
        source, source_mask = self.source._gather(there), jnp.asarray(there >= 0)
      x, routing, beside = walk.layer(
          self.config, self.stack, index, params, self.stack_params, self._gather(place),
          jnp.asarray(place >= 0), source, source_mask,
      )
      real = place >= 0
      self.buffer[place[real]] = np.asarray(x)[real]
      for name, a in zip(('choice', 'gate', 'keep'), routing or ()):
        a = np.asarray(a)
        flat = routed.setdefault(name, np.zeros((len(self.buffer), a.shape[-1]), a.dtype))
        flat[place[real]] = a.reshape(*place.shape, -1)[real]
      if beside is not None:
        added = np.zeros_like(self.buffer) if added is None else added
        added[place[real]] = np.asarray(beside)[real]
    if routed:
      self._start_experts(params, routed, added)

  def _start_experts(self, params, routed, added) -> None:
    self.routing = routed['choice'], routed['gate'], routed['keep']
    self._layer_params = params
    once = routed['choice'].shape[1] == 1 and added is None
    self._before = self.buffer if once else self.buffer.copy()
    if added is not None:
      self.buffer += added
    omega = tree.flatten(params).get('ffn/omega')
    self._scale = None if omega is None else np.asarray(omega, np.float32)

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
      x = jnp.asarray(_pad_rows(self._before[piece]))
      normed = walk.expert_norm(self.config, self._layer_params, x)
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
      y = y if self._scale is None else y * self._scale
      self.buffer[piece] += factor[start : start + len(piece), None].astype(np.float32) * y

  def finish(self) -> None:
    """The stack's final norm."""
    for start in range(0, len(self.buffer), _ROWS):
      piece = self.buffer[start : start + _ROWS]
      normed = walk.final_norm(self.config, self.stack_params, jnp.asarray(_pad_rows(piece)))
      self.buffer[start : start + len(piece)] = np.asarray(normed)[: len(piece)]


def _pad_rows(x_md: np.ndarray) -> np.ndarray:
  rows = min(_ROWS, max(16, 1 << (len(x_md) - 1).bit_length()))
  return np.pad(x_md, ((0, rows - len(x_md)), (0, 0)))
