"""Text from a model: a prefill, then a jitted loop over tokens with a cache.

Works on params of any node class; nothing here looks at weights. Prompts of unequal length are
padded on the left, so that every row writes the same slot of its cache.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from moejax.config import ModelConfig, StackConfig
from moejax.errors import UserError
from moejax.model import Model
from moejax.nn import decoder, switch_steps

# Prompts and caches are rounded up to this, so that few shapes are compiled.
_ROUND = 16
_NEVER = np.int32(2**30)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How the next token is picked from the logits.

  temperature: 0 takes the most probable token; else logits are divided by it. top_k: only the k
  most probable tokens, 0 for all. top_p: only the fewest tokens whose probabilities reach p
  (arXiv 1904.09751), the most probable one always among them.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if not self.temperature >= 0:
      raise UserError(f'temperature = {self.temperature}: at least 0')
    if self.top_k < 0:
      raise UserError(f'top_k = {self.top_k}: at least 0')
    if not 0 < self.top_p <= 1:
      raise UserError(f'top_p = {self.top_p}: in (0, 1]')

  @property
  def way(self) -> str | int:
    """What is compiled for it: 'greedy', 'draw' from all tokens, draw from the so many most
    probable, or 'filter' them by a sort, which costs more than finding a fixed number."""
    if self.temperature == 0:
      return 'greedy'
    return 'filter' if self.top_p < 1 else self.top_k or 'draw'


class _Rule(NamedTuple):
  """The numbers of a Sampling and the ids that stop a row (-1 for none): operands, so that other
  numbers need no other program."""

  temperature: Any
  top_k: Any
  top_p: Any
  stops_n: Any


def filter_logits(logits_bv: jax.Array, sampling: Sampling | _Rule) -> jax.Array:
  """Logits over the temperature, those that may not be drawn at -inf; float32 [b, v].

  A token as probable as the k-th is kept with it.
  """
  logits_bv = logits_bv.astype(jnp.float32) / sampling.temperature
  vocabulary = logits_bv.shape[-1]
  order = jnp.argsort(-logits_bv, axis=-1, stable=True)
  falling = jnp.take_along_axis(logits_bv, order, axis=-1)
  k = jnp.where(sampling.top_k == 0, vocabulary, jnp.minimum(sampling.top_k, vocabulary))
  falling = jnp.where(falling < falling[:, k - 1][:, None], -jnp.inf, falling)
  probs = jax.nn.softmax(falling, axis=-1)
  before = jnp.cumsum(probs, axis=-1) - probs
  # Sums of rounded probabilities may pass 1 before the last token.
  keep = (falling > -jnp.inf) & ((before < sampling.top_p) | (sampling.top_p >= 1))
  rows = jnp.arange(len(order))[:, None]
  return jnp.full_like(logits_bv, -jnp.inf).at[rows, order].set(jnp.where(keep, falling, -jnp.inf))


def pick(logits_bv: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
  """The next token of each row, int32 [b]; each row draws from a key of its own."""
  return _pick(sampling.way, logits_bv, sampling, key)


def _pick(
    way: str | int, logits_bv: jax.Array, rule: Sampling | _Rule, key: jax.Array
) -> jax.Array:
  if way == 'greedy':
    return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
  keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(logits_bv.shape[0]))
  if way == 'filter':
    logits_bv = filter_logits(logits_bv, rule)
  else:
    logits_bv = logits_bv.astype(jnp.float32) / rule.temperature
    if isinstance(way, int) and way < logits_bv.shape[-1]:
      least = jax.lax.top_k(logits_bv, way)[0][:, -1:]
      logits_bv = jnp.where(logits_bv < least, -jnp.inf, logits_bv)
  return jax.vmap(jax.random.categorical)(keys, logits_bv).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
  """Where a generation stands; a pytree.

  caches: of all layers. fixed: what every step reads and none changes. at: int32 [], the slot of
  the next token. count: int32 [], tokens made. token_b, done_b: the last token, and whether the row
  has stopped.
  """

  caches: Any
  fixed: Any
  at: jax.Array
  count: jax.Array
  token_b: jax.Array
  done_b: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
  """What a compiled program depends on beside its arrays."""

  config: ModelConfig
  slots: int
  way: str | int
  pad_id: int
  dtype: str
  mesh: Mesh | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
  """tokens: int32 [b, n], rows that stopped filled with padding; lengths: int32 [b], tokens of each
  row, its stop token included; stopped: bool [b]."""

  tokens: np.ndarray
  lengths: np.ndarray
  stopped: np.ndarray

  def rows(self) -> list[list[int]]:
    """The tokens of each row without padding."""
    return [row[:n].tolist() for row, n in zip(self.tokens, self.lengths)]


def left_padded(prompts: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
  """Prompts as int32 [b, width] with zeros before them, and how many zeros, int32 [b]."""
  tokens = np.zeros((len(prompts), width), np.int32)
  for row, prompt in zip(tokens, prompts):
    row[width - len(prompt) :] = prompt
  return tokens, np.array([width - len(prompt) for prompt in prompts], np.int32)


def _round_up(n: int) -> int:
  return -(-n // _ROUND) * _ROUND


def _first(plan: _Plan, rule: _Rule, logits_bv: jax.Array, key: jax.Array, **state: Any) -> State:
  token = _pick(plan.way, logits_bv, rule, jax.random.fold_in(key, 0))
  return State(token_b=token, done_b=_stops(rule, token), count=jnp.int32(1), **state)


def _stops(rule: _Rule, token_b: jax.Array) -> jax.Array:
  return (token_b[:, None] == rule.stops_n[None]).any(1)


@functools.partial(jax.jit, static_argnames=('plan',))
def _start_decoder(plan, params, rule, tokens_bt, pad_b, key) -> State:
  """Runs the prompts; the first new token is picked."""
  config, (batch, width) = plan.config, tokens_bt.shape
  positions_bt = jnp.arange(width)[None] - pad_b[:, None]
  slots = jnp.broadcast_to(jnp.arange(plan.slots)[None], (batch, plan.slots)) - pad_b[:, None]
  keys_bs = jnp.where(slots < 0, _NEVER, slots)
  caches = decoder.empty_caches(config, batch, plan.slots, plan.dtype)
  logits, caches = decoder.step(
      config, params, tokens_bt, caches, 0, positions_bt=positions_bt, key_positions_bs=None,
      length=plan.slots, dtype=jnp.dtype(plan.dtype), mesh=plan.mesh,
  )
  fixed = {'keys_bs': keys_bs, 'pad_b': pad_b}
  return _first(plan, rule, logits, key, caches=caches, fixed=fixed, at=jnp.int32(width))


@functools.partial(jax.jit, static_argnames=('plan',))
def _start_encdec(plan, params, rule, tokens_bs, mask_bs, key) -> State:
  """Encodes the prompts and runs the start token; the first new token is picked."""
  config, dtype = plan.config, jnp.dtype(plan.dtype)
  encoded = switch_steps.encode(config, params, tokens_bs, mask_bs, dtype, plan.mesh)
  source = switch_steps.source_keys(config, params, encoded)
  caches = switch_steps.empty_caches(config, len(tokens_bs), plan.slots, dtype)
  start = jnp.full((len(tokens_bs), 1), config.decoder_start_id, jnp.int32)
  logits, caches = switch_steps.step(
      config, params, start, caches, 0, source=source, source_mask_bs=mask_bs, dtype=dtype,
      mesh=plan.mesh,
  )
  fixed = {'source': source, 'mask_bs': mask_bs}
  return _first(plan, rule, logits, key, caches=caches, fixed=fixed, at=jnp.int32(1))


def _logits(plan: _Plan, params: Any, state: State) -> tuple[jax.Array, Any]:
  config, dtype, token_b1 = plan.config, jnp.dtype(plan.dtype), state.token_b[:, None]
  if isinstance(config, StackConfig):
    return decoder.step(
        config, params, token_b1, state.caches, state.at,
        positions_bt=state.at - state.fixed['pad_b'][:, None],
        key_positions_bs=state.fixed['keys_bs'], length=plan.slots, dtype=dtype, mesh=plan.mesh,
    )
  return switch_steps.step(
      config, params, token_b1, state.caches, state.at, source=state.fixed['source'],
      source_mask_bs=state.fixed['mask_bs'], dtype=dtype, mesh=plan.mesh,
  )


@functools.partial(jax.jit, static_argnames=('plan', 'room'), donate_argnames=('state',))
def _go_on(plan, params, rule, state, key, steps, limit, *, room) -> tuple[State, jax.Array]:
  """At most `steps` more tokens, the first of [b, room]; ends early where every row has stopped."""
  batch = state.token_b.shape[0]

  def unfinished(carry):
    i, state, _ = carry
    return (i < steps) & (state.count < limit) & ~state.done_b.all()

  def body(carry):
    i, state, out = carry
    logits, caches = _logits(plan, params, state)
    token = _pick(plan.way, logits, rule, jax.random.fold_in(key, state.count))
    token = jnp.where(state.done_b, plan.pad_id, token)
    out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], i, 1)
    new = dataclasses.replace(
        state, caches=caches, at=state.at + 1, count=state.count + 1, token_b=token,
        done_b=state.done_b | _stops(rule, token),
    )
    return i + 1, new, out

  out = jnp.full((batch, room), plan.pad_id, jnp.int32)
  _, state, out = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state, out))
  return state, out


def _check(config: ModelConfig, prompts: Sequence[Sequence[int]], new: int) -> None:
  if not config.stacks[-1] == 'decoder':
    raise UserError(f'a {config.family} writes no text: generate takes models with a decoder')
  if not prompts or not all(len(prompt) for prompt in prompts):
    raise UserError('generate needs prompts of at least one token')
  if new < 1:
    raise UserError(f'max_new_tokens = {new}: at least 1')
  low, high = min(map(min, prompts)), max(map(max, prompts))
  if low < 0 or high >= config.vocab_size:
    raise UserError(
        f'prompt tokens span {low}..{high}, the model knows 0..{config.vocab_size - 1}: use the '
        'tokenizer of the model'
    )
  if isinstance(config, StackConfig):
    longest = max(map(len, prompts))
    if longest + new > config.max_positions:
      raise UserError(
          f'a prompt of {longest} tokens and max_new_tokens = {new} are more than the '
          f"model's context of {config.max_positions}: shorten one"
      )


def stop_ids_of(config: ModelConfig) -> tuple[int, ...]:
  """The model's own end-of-text ids."""
  return config.eos_ids if isinstance(config, StackConfig) else (config.eos_id,)


def stream(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] | None = None,
    key: jax.Array | None = None,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    every: int = 1,
) -> Iterator[np.ndarray]:
  """Yields new tokens as they come, int32 [b, <= every] at a time; see `generate`.

  A row that has stopped goes on as padding (`pad_id`, or 0) until all have.
  """
  config = model.config
  _check(config, prompts, max_new_tokens)
  key = jax.random.key(0) if key is None else key
  stops = stop_ids_of(config) if stop_ids is None else tuple(stop_ids)
  chosen = sampling or Sampling()
  padded = np.full(max(_round_up(len(stops)), _ROUND), -1, np.int32)
  padded[: len(stops)] = stops
  rule = _Rule(
      np.float32(chosen.temperature), np.int32(chosen.top_k), np.float32(chosen.top_p), padded
  )
  plan = functools.partial(
      _Plan, config=config, way=chosen.way, pad_id=config.pad_id or 0,
      dtype=str(jnp.dtype(dtype)), mesh=mesh,
  )
  width = _round_up(max(map(len, prompts)))
  tokens, pad_b = left_padded(prompts, width)
  if isinstance(config, StackConfig):
    made = plan(slots=_round_up(width + max_new_tokens))
    state = _start_decoder(made, model.params, rule, tokens, pad_b, key)
  else:
    made = plan(slots=_round_up(1 + max_new_tokens))
    rows = [np.roll(row, -pad) for row, pad in zip(tokens, pad_b)]
    mask = np.arange(width)[None] < (width - pad_b)[:, None]
    state = _start_encdec(made, model.params, rule, np.stack(rows), mask, key)
  yield np.asarray(state.token_b)[:, None]
  left = max_new_tokens - 1
  while left > 0 and not bool(state.done_b.all()):
    before = int(state.count)
    state, out = _go_on(
        made, model.params, rule, state, key, np.int32(every), np.int32(max_new_tokens),
        room=_round_up(every),
    )
    count = int(state.count) - before
    yield np.asarray(out)[:, :count]
    left -= count


def generate(
    model: Model, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 64,
    on_tokens: Callable[[np.ndarray], None] | None = None, **options: Any,
) -> Generated:
  """Continues prompts, or answers them where the model is an encoder-decoder.

  Args:
    model: of any family; its params may hold weight nodes.
    prompts: token ids of each row, of any lengths; an encoder-decoder's go to the encoder.
    max_new_tokens: per row.
    on_tokens: called with each piece of `stream`; without it the whole loop is one program.
    options: of `stream`: `sampling`; `stop_ids` (default: the model's own), `key`, `dtype` of
      activations and cache, `mesh`, `every`.

  Raises:
    UserError: no prompt, ids outside the vocabulary, more tokens than the model's context.
  """
  if on_tokens is None:
    options.setdefault('every', max(max_new_tokens - 1, 1))
  pieces = []
  for piece in stream(model, prompts, max_new_tokens=max_new_tokens, **options):
    pieces.append(piece)
    if on_tokens is not None:
      on_tokens(piece)
  tokens = np.concatenate(pieces, axis=1)
  given = options.get('stop_ids')
  stops = np.isin(tokens, stop_ids_of(model.config) if given is None else tuple(given))
  stopped = np.asarray(stops.any(1))
  lengths = np.where(stopped, stops.argmax(1) + 1, tokens.shape[1]).astype(np.int32)
  tokens = np.where(np.arange(tokens.shape[1])[None] < lengths[:, None], tokens, 0)
  return Generated(tokens=tokens.astype(np.int32), lengths=lengths, stopped=stopped)


def text_pieces(
    pieces: Iterator[Sequence[int]], decode: Callable[[list[int]], str]
) -> Iterator[str]:
  """What each piece of one row's tokens adds to the text, whole characters only."""
  ids: list[int] = []
  shown = ''
  for piece in pieces:
    ids.extend(piece)
    text = decode(ids)
    if not text.endswith('\ufffd') and text.startswith(shown):
      yield text[len(shown) :]
      shown = text
