"""Worker: layers of T5-base that run a share of their neurons against dense ones, by tokens.

Twelve layers, one after the other in one program, as in a model: each finds its weights in memory
and not in a cache. A row's time is that of one layer, its router counted in, which scores as
MoEfication's MLP does; kernels are random, so loads are uneven as those of a random router are,
which each row tells. Then a model of the size of T5-base, whole.
"""

from collections.abc import Callable
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing
from kernels_pallas.neuron_select import api
import moejax
from moejax.compress import chooser_core, compress, router_training
from moejax.config import EncDecConfig
from moejax.generate import generate
from moejax.model import Model
from moejax.ops import ffn, norm
from moejax.routing import choice

D, D_FF, LAYERS, SHARE = 768, 3072, 12, 0.2
SIZES, TOKENS = (32, 128, 192, 256), (1, 8, 16, 64, 512)
# Where much is chosen nothing can be saved, and little should be lost.
HIGH, HIGH_SIZES, HIGH_TOKENS = (0.5, 1.0), (32, 256), (1, 8, 64, 512)
# Wide experts chosen by a threshold, so that the share is exact.
EXACT_SIZES = (192, 256)

Weights = dict[str, jax.Array]


def weights(size: int, d: int, d_ff: int, layers: int) -> list[Weights]:
  rng = np.random.default_rng(size)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32) * shape[-2] ** -0.5)
  e = d_ff // size
  return [
      {'wi': draw(e, d, size), 'wo': draw(e, size, d), 'kernel': draw(d, e), 'out': draw(e, e)}
      for _ in range(layers)
  ]


def as_dense(w: Weights) -> Weights:
  e, d, size = w['wi'].shape
  return {
      'wi': jnp.array(w['wi'].swapaxes(0, 1).reshape(d, e * size)),
      'wo': jnp.array(w['wo'].reshape(e * size, d)),
  }


def _normed(x_md: jax.Array) -> jax.Array:
  return norm.rms_norm(x_md, jnp.ones(x_md.shape[1]), 1e-6)


@jax.jit
def dense(layers: list[Weights], x_md: jax.Array) -> jax.Array:
  for w in layers:
    x_md = x_md + ffn.dense_ffn(w, _normed(x_md), 'relu')
  return x_md


@functools.partial(jax.jit, static_argnames=('k', 'share'))
def selected(
    layers: list[Weights], x_md: jax.Array, k: int = 0, share: float = 0.0,
    taus: list[jax.Array] | None = None,
) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
  """(output, tokens of each expert by layer, thresholds); k experts a token, or those above taus.

  Without k and taus, thresholds are found so that `share` of all pairs are above them.
  """
  loads, found = [], []
  for i, w in enumerate(layers):
    x = _normed(x_md)
    scores = choice.scores(w, x, 'mlp')
    if k:
      chosen = choice.top(scores, k)
    else:
      found.append(jnp.quantile(scores, 1 - share) if taus is None else taus[i])
      chosen = choice.above(scores, found[-1])
    loads.append(chosen.sum(0))
    x_md = x_md + api.neuron_select(x, {'wi': w['wi'], 'wo': w['wo']}, chosen, jax.nn.relu)
  return x_md, loads, found


def _timed(fns: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
  def blocking(fn):
    return lambda: jax.block_until_ready(fn())

  blocked = {name: blocking(fn) for name, fn in fns.items()}
  return timing.measure(blocked, repeats=repeats, budget_s=6.0)


def layer_rows(
    layers: list[Weights], whole: list[Weights], tokens: int, share: float, exact: bool,
    repeats: int,
) -> list[dict[str, Any]]:
  e, d, size = layers[0]['wi'].shape
  x = jnp.asarray(np.random.default_rng(0).standard_normal((tokens, d), np.float32))
  if exact:
    taus = selected(layers, x, share=share)[2]
    run = lambda: selected(layers, x, taus=taus)
  else:
    run = lambda: selected(layers, x, k=max(1, round(share * e)))
  loads = np.asarray(run()[1], np.float64)
  ran = loads.sum() / (len(layers) * tokens * e)
  skew = float(np.median(loads.max(1) / np.maximum(loads.mean(1), 1e-9)))
  ours, theirs = 'moejax', 'dense layer, moejax'
  seconds = _timed({ours: run, theirs: lambda: dense(whole, x)}, repeats)
  how = 'above a threshold' if exact else f'{max(1, round(share * e))}'
  case = f'{how} of {e} experts of {size} ({ran:.1%})'.replace('%', ' %')
  metric = f'{tokens} token{"s" if tokens > 1 else ""}'
  if share >= min(HIGH):
    metric += f' at {share:.0%}'.replace('%', ' %')
  each = {who: [s / len(layers) for s in samples] for who, samples in seconds.items()}
  return [
      timing.row(case, metric, ours, each[ours], ours=True, skew=round(skew, 2)),
      timing.row(case, metric, theirs, each[theirs], ours=False),
  ]


def stack_rows(quick: bool) -> list[dict[str, Any]]:
  d, d_ff, layers, repeats = (16, 64, 2, 2) if quick else (D, D_FF, LAYERS, 40)
  rows: list[dict[str, Any]] = []
  for size in (8,) if quick else SIZES:
    own = weights(size, d, d_ff, layers)
    whole = [as_dense(w) for w in own]
    cases = [(n, SHARE, False) for n in ((1, 40) if quick else TOKENS)]
    if size in EXACT_SIZES or quick:
      cases += [(n, SHARE, True) for n in ((40,) if quick else TOKENS[1:])]
    if size in HIGH_SIZES or quick:
      cases += [(n, s, False) for s in HIGH for n in ((40,) if quick else HIGH_TOKENS)]
    for tokens, share, exact in cases:
      rows += layer_rows(own, whole, tokens, share, exact, repeats)
  return rows


def model_rows(quick: bool) -> list[dict[str, Any]]:
  """A T5 of random weights before and after its layers are split: a forward pass, and words."""
  config = EncDecConfig(
      family='t5', vocab_size=32128, d_model=D, d_ff=D_FF, num_layers=LAYERS,
      num_decoder_layers=LAYERS, num_heads=12, d_kv=64, moe=None,
  )
  if quick:
    config = dataclasses.replace(
        config, vocab_size=128, d_model=16, d_ff=64, num_layers=1, num_decoder_layers=1,
        num_heads=2, d_kv=8,
    )
  model = Model.init(config, jax.random.key(0))
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.integers(3, config.vocab_size, shape).astype(np.int32)

  batch = {'encoder_tokens': draw(1, 64), 'decoder_tokens': draw(1, 16), 'targets': draw(1, 16)}
  batch['weights'] = np.ones((1, 16), np.float32)
  step = moejax.moefy(8 if quick else 16, split='contiguous', choice='cosine', share=SHARE)
  split = compress(model, step, [batch]).model
  text, words, prompt = draw(1, 16 if quick else 512), draw(1, 64), draw(1, 16).tolist()
  rows: list[dict[str, Any]] = []

  def answer(model):
    return generate(model, prompt, max_new_tokens=32, stop_ids=()).tokens

  for metric, run in (
      ('512 tokens in, 64 out, forward', lambda m: m.apply(text, words).logits_btv),
      ('32 tokens out after 16 in, greedy', answer),
  ):
    seconds = _timed({'moejax': lambda: run(split), 'dense model, moejax': lambda: run(model)}, 8)
    rows += [
        timing.row('T5-base, 3 of 16 experts of 192 (18.8 %)', metric, who, samples,
                   ours=who == 'moejax') for who, samples in seconds.items()
    ]
  return rows


def training_rows(tokens: int, d: int, experts: int, epochs: int) -> list[dict[str, Any]]:
  rng = np.random.default_rng(0)
  x = rng.standard_normal((tokens, d), np.float32)
  labels = np.repeat(np.arange(experts), 32)
  rows_df = rng.standard_normal((d, 32 * experts), np.float32)
  centres = chooser_core.centres(rows_df, labels)
  mass = np.asarray(chooser_core.activation_mass(
      jnp.asarray(x @ rows_df), jnp.asarray(labels), experts
  ))
  start = time.perf_counter()
  router_training.train_mlp(
      router_training.initial_mlp(centres), x, mass, max(1, experts // 5), epochs=epochs
  )
  return [timing.row(
      f'{tokens:,} tokens, {experts} experts', f'training the router, {epochs} epochs', 'moejax',
      [time.perf_counter() - start], ours=True,
  )]


def main(quick: bool) -> list[dict[str, Any]]:
  training = training_rows(64, 8, 2, 1) if quick else training_rows(10_000, 768, 96, 30)
  return stack_rows(quick) + model_rows(quick) + training


if __name__ == '__main__':
  timing.run(main)
