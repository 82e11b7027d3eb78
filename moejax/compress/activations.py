"""Hidden states of all samples in one host buffer, walked layer by layer (QMoE section 3.2.1).

One layer runs with its own parameters, on padded batches of a few static shapes (`walk`); the
buffer itself is flat, [tokens, d], without padding.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import tree
from moejax.compress import samples as samples_lib
from moejax.compress import walk
from moejax.config import Activation, ModelConfig
from moejax.ops import ffn

_ROWS = 2048

# Sees rows of an expert's work: inputs and outputs [m, d], and the gates [m].
See = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


@functools.partial(jax.jit, static_argnames=('activation',))
def _expert(weights_df, x_md, activation):
  return ffn.dense_ffn(weights_df, x_md, activation)


class Activations:
  """The hidden states of one stack; see the module."""

  def __init__(
      self, config: ModelConfig, stack: str, samples: samples_lib.Samples,
      batches: list[samples_lib.Batch], outer: walk.Params, source: 'Activations | None' = None,
      keep_logits: bool = False,
  ):
    """Embeds the tokens of every sample.

    Args:
      config: the model's. stack: one of its stacks. samples, batches: see `samples`.
      outer: the params outside of layers.
      source: the finished encoder, for a decoder behind one.
      keep_logits: whether `routing` holds the router's logits.
    """
    own = [s.tokens[stack] for s in samples.samples]
    tokens, positions = np.concatenate(own), np.concatenate([np.arange(len(t)) for t in own])
    self.config, self.stack, self.batches, self.source = config, stack, batches, source
    self.stack_params = jax.tree.map(jnp.asarray, dict(outer.get(stack, {})))
    self.buffer = walk.embed(config, outer, tokens, positions)
    self._fields = [f for f in walk.Routed._fields if f != 'logits' or keep_logits]
    self._before = self.buffer
    self.act = Activation(config.activation)
    self._layer: tuple[int, Any] | None = None
    self._routing: walk.Routed | None = None
    self._added: np.ndarray | None = None

  def _gather(self, index: np.ndarray, buffer: np.ndarray | None = None) -> jax.Array:
    buffer = self.buffer if buffer is None else buffer
    return jnp.asarray(np.where(index[..., None] >= 0, buffer[np.maximum(index, 0)], 0.0))

  @property
  def routing(self) -> walk.Routed:
    """Of the sparse layer that was run last, by its own router; logits None unless kept."""
    assert self._routing is not None
    return self._routing

  def run_layer(self, index: int, params: walk.Params) -> None:
    """A dense layer whole; a sparse one up to its experts, keeping each token's routing."""
    params = jax.tree.map(jnp.asarray, params)
    self.act = self.config.of_layer(self.stack, index).act
    found: dict[str, np.ndarray] = {}
    added: np.ndarray | None = None
    for batch in self.batches:
      place = batch.index[self.stack]
      source = source_mask = None
      if self.source is not None:
        there = batch.index[self.source.stack]
        source, source_mask = self.source._gather(there), jnp.asarray(there >= 0)
      x, routed, beside = walk.layer(
          self.config, self.stack, index, params, self.stack_params, self._gather(place),
          jnp.asarray(place >= 0), source, source_mask,
      )
      real = place >= 0
      self.buffer[place[real]] = np.asarray(x)[real]
      if routed is not None:
        self._scatter(found, routed, place)
      if beside is not None:
        added = np.zeros_like(self.buffer) if added is None else added
        added[place[real]] = np.asarray(beside)[real]
    if found:
      self._layer = index, params
      self._routing = self._way = _joined(found)
      self._start_experts(params, added)

  def _scatter(self, found: dict[str, np.ndarray], routed: walk.Routed, place: np.ndarray) -> None:
    """A batch's routing into flat arrays."""
    real = place >= 0
    for name in self._fields:
      a = np.asarray(getattr(routed, name))
      flat = found.setdefault(name, np.zeros((len(self.buffer), a.shape[-1]), a.dtype))
      flat[place[real]] = a.reshape(*place.shape, -1)[real]

  def reroute(self, config: ModelConfig, leaves: Mapping[str, Any]) -> None:
    """From here on `run_expert` takes the way of a changed router, to the experts to come.

    What the layer adds beside its experts changes too.

    Args:
      config: of the model to come. leaves: what changes in the FFN, by path; experts only where
        the router looks at them.
    """
    assert self._layer is not None
    index, params = self._layer
    changed = tree.unflatten({
        **tree.flatten(params), **{f'ffn/{name}': jnp.asarray(a) for name, a in leaves.items()}
    })
    if self._before is self.buffer:
      self._before = self.buffer.copy()
    if self._added is not None:
      self.buffer -= self._added
    found: dict[str, np.ndarray] = {}
    for batch in self.batches:
      place = batch.index[self.stack]
      x = self._gather(place, self._before)
      routed, beside = walk.route(config, self.stack, index, changed, x, jnp.asarray(place >= 0))
      self._scatter(found, routed, place)
      if beside is not None:
        real = place >= 0
        self.buffer[place[real]] += np.asarray(beside)[real]
    self._way = _joined(found)

  def _start_experts(self, params, added) -> None:
    once = self.routing.choice.shape[1] == 1 and added is None
    self._before = self.buffer if once else self.buffer.copy()
    self._added = added
    if added is not None:
      self.buffer += added
    omega = tree.flatten(params).get('ffn/omega')
    self._scale = None if omega is None else np.asarray(omega, np.float32)

  def tokens_of(self, expert: int) -> np.ndarray:
    """The tokens that go to an expert, in order."""
    return _tokens(self.routing, expert)

  def gates_of(self, expert: int, tokens: np.ndarray) -> np.ndarray:
    """The gates of some tokens of an expert, float32 [m]."""
    return _gates(self.routing, expert, tokens)

  def expert_inputs(self, tokens: np.ndarray) -> np.ndarray:
    """Normed inputs of the experts, float32 [m, d]."""
    assert self._layer is not None
    out = np.empty((len(tokens), self.buffer.shape[1]), np.float32)
    for start in range(0, len(tokens), _ROWS):
      piece = tokens[start : start + _ROWS]
      x = jnp.asarray(_pad_rows(self._before[piece]))
      normed = walk.expert_norm(self.config, self._layer[1], x)
      out[start : start + len(piece)] = np.asarray(normed)[: len(piece)]
    return out

  def output_sum(self, weights_df: Mapping[str, np.ndarray]) -> np.ndarray:
    """An expert's outputs for all tokens of the layer, added up, float64 [d]."""
    own = {name: jnp.asarray(w) for name, w in weights_df.items()}
    total = np.zeros(self.buffer.shape[1])
    for start in range(0, len(self.buffer), _ROWS):
      x = self.expert_inputs(np.arange(start, min(start + _ROWS, len(self.buffer))))
      y = np.asarray(_expert(own, jnp.asarray(_pad_rows(x)), self.act))
      total += y[: len(x)].sum(0, dtype=np.float64)
    return total

  def run_expert(
      self, expert: int, weights_df: Mapping[str, np.ndarray], see: See | None = None
  ) -> None:
    """Adds gate * expert(norm(x)) to every token of one expert; `see` gets what it computes."""
    tokens = _tokens(self._way, expert)
    if not tokens.size:
      return
    own = {name: jnp.asarray(w) for name, w in weights_df.items()}
    factor = _gates(self._way, expert, tokens)
    for start in range(0, len(tokens), _ROWS):
      piece = tokens[start : start + _ROWS]
      x = _pad_rows(self.expert_inputs(piece))
      y = np.asarray(_expert(own, jnp.asarray(x), self.act))[: len(piece)]
      gates = factor[start : start + len(piece)]
      if see is not None:
        see(x[: len(piece)], y, gates)
      y = y if self._scale is None else y * self._scale
      self.buffer[piece] += gates[:, None] * y

  def finish_layer(self) -> None:
    """What comes once the experts of the sparse layer that was run last have been added."""
    assert self._layer is not None
    if self.config.post_norm:
      params = self._layer[1]
      self._each(lambda x: walk.norm_behind(self.config, params, x))

  def finish(self) -> None:
    """The stack's final norm."""
    self._each(lambda x: walk.final_norm(self.config, self.stack_params, x))

  def _each(self, norm: Callable[[jax.Array], jax.Array]) -> None:
    for start in range(0, len(self.buffer), _ROWS):
      piece = self.buffer[start : start + _ROWS]
      normed = norm(jnp.asarray(_pad_rows(piece)))
      self.buffer[start : start + len(piece)] = np.asarray(normed)[: len(piece)]


def _joined(found: Mapping[str, np.ndarray]) -> walk.Routed:
  return walk.Routed(found['choice'], found['gate'], found['keep'], found.get('logits'))


def _tokens(routed: walk.Routed, expert: int) -> np.ndarray:
  return np.flatnonzero(((routed.choice == expert) & routed.keep).any(1))


def _gates(routed: walk.Routed, expert: int, tokens: np.ndarray) -> np.ndarray:
  own = (routed.choice[tokens] == expert) & routed.keep[tokens]
  return np.where(own, routed.gate[tokens], 0.0).sum(1).astype(np.float32)


def _pad_rows(x_md: np.ndarray) -> np.ndarray:
  rows = min(_ROWS, max(16, 1 << (len(x_md) - 1).bit_length()))
  return np.pad(x_md, ((0, rows - len(x_md)), (0, 0)))
