"""Worker: a layer of T5-base that runs a fifth of its neurons against the dense one, by tokens.

The router is counted in, scores as MoEfication's MLP; its kernels are random, so loads are uneven
as those of a random router are, which each row tells. Before each call the caches are filled with
something else: in a model the other layers do that.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing
from kernels_pallas.neuron_select import api
from moejax.compress import chooser_core, router_training
from moejax.ops import ffn
from moejax.routing import choice

D, D_FF, SHARE = 768, 3072, 0.2
SIZES, TOKENS = (32, 128, 256), (1, 8, 16, 64, 512)


def weights(size: int, d: int, d_ff: int) -> dict[str, jax.Array]:
  rng = np.random.default_rng(size)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32) * shape[-2] ** -0.5)
  e = d_ff // size
  return {'wi': draw(e, d, size), 'wo': draw(e, size, d), 'kernel': draw(d, e), 'out': draw(e, e)}


@functools.partial(jax.jit, static_argnames=('k',))
def selected(w, x_md, k):
  chosen = choice.top(choice.scores(w, x_md, 'mlp'), k)
  return api.neuron_select(x_md, {'wi': w['wi'], 'wo': w['wo']}, chosen, jax.nn.relu)


@jax.jit
def dense(w, x_md):
  return ffn.dense_ffn(w, x_md, 'relu')


@jax.jit
def _other_layers(elsewhere):
  return elsewhere.sum()


def layer_rows(
    size: int, tokens: int, d: int, d_ff: int, repeats: int, elsewhere: jax.Array
) -> list[dict[str, Any]]:
  w = weights(size, d, d_ff)
  k = max(1, round(SHARE * d_ff / size))
  x = jnp.asarray(np.random.default_rng(0).standard_normal((tokens, d), np.float32))
  whole = {
      'wi': jnp.array(w['wi'].swapaxes(0, 1).reshape(d, d_ff)),
      'wo': jnp.array(w['wo'].reshape(d_ff, d)),
  }
  load = np.asarray(choice.top(choice.scores(w, x, 'mlp'), k)).sum(0)
  seconds: dict[str, list[float]] = {'chosen': [], 'dense': []}
  for i in range(repeats + 2):
    for name, run in (('chosen', lambda: selected(w, x, k)), ('dense', lambda: dense(whole, x))):
      jax.block_until_ready(_other_layers(elsewhere))
      start = time.perf_counter()
      jax.block_until_ready(run())
      if i > 1:
        seconds[name].append(time.perf_counter() - start)
  case = f'{k} of {d_ff // size} experts of {size}'
  metric = f'{tokens} token{"s" if tokens > 1 else ""}'
  return [
      timing.row(case, metric, 'moejax', seconds['chosen'], ours=True,
                 skew=round(float(load.max() / max(load.mean(), 1e-9)), 2)),
      timing.row(case, metric, 'dense layer, moejax', seconds['dense'], ours=False),
  ]


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
  rows: list[dict[str, Any]] = []
  d, d_ff = (16, 64) if quick else (D, D_FF)
  elsewhere = jnp.ones((1 if quick else 16) << 20)
  for size in (8,) if quick else SIZES:
    for tokens in (1, 40) if quick else TOKENS:
      rows += layer_rows(size, tokens, d, d_ff, 2 if quick else 40, elsewhere)
  return rows + (training_rows(64, 8, 2, 1) if quick else training_rows(10_000, 768, 96, 30))


if __name__ == '__main__':
  timing.run(main)
