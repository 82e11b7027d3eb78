"""Worker: what merging and pruning do to one layer, and statistics streamed over many tokens."""

import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing
from moejax.compress import (
  align_core,
  grouping_core,
  merge_core,
  prune_core,
  similarity_core,
  stats_core,
)

# Experts, inputs, hidden units.
LAYERS = ((32, 768, 3072), (128, 256, 1024))
_QUICK = ((8, 16, 32),)
_ROWS = 8192


def layer(experts: int, d: int, f: int) -> dict[str, np.ndarray]:
  """Permuted, noisy copies of a few prototypes, as trained experts are alike in part."""
  rng = np.random.default_rng(0)
  kinds = rng.normal(size=(4, d, f)).astype(np.float32), rng.normal(size=(4, f, d)).astype('f4')
  wi, wo = np.empty((experts, d, f), np.float32), np.empty((experts, f, d), np.float32)
  for e in range(experts):
    order = rng.permutation(f)
    wi[e] = kinds[0][e % 4][:, order] + 0.5 * rng.standard_normal((d, f), np.float32)
    wo[e] = kinds[1][e % 4][order] + 0.5 * rng.standard_normal((f, d), np.float32)
  return {'wi': wi, 'wo': wo}


@jax.jit
def _sums(logits_me: jax.Array) -> dict[str, jax.Array]:
  choice = jnp.argmax(logits_me, 1)[:, None].astype(jnp.int32)
  mask = jnp.ones(len(logits_me), bool)
  return stats_core.routing_sums(logits_me, choice, jnp.ones(choice.shape), mask)


def streamed(logits_me: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Usage and similarity by router logits, in pieces."""
  totals: stats_core.Sums = {}
  for start in range(0, len(logits_me), 8 * _ROWS):
    totals = stats_core.add(totals, _sums(jnp.asarray(logits_me[start : start + 8 * _ROWS])))
  return stats_core.usage(totals), np.asarray(similarity_core.from_gram(totals['gram']))


def statistics_rows(tokens: int, experts: int, repeats: int) -> list[dict[str, Any]]:
  logits = np.random.default_rng(0).standard_normal((tokens, experts), np.float32)
  usage, similarity = streamed(logits)
  seconds = timing.measure({'moejax': lambda: streamed(logits)}, repeats=repeats, warmup=0)
  return [timing.row(
      f'{tokens:,} tokens, {experts} experts', 'usage and router similarity', 'moejax',
      seconds['moejax'], ours=True,
      work={'usage': float((usage**2).sum()), 'similarity': float(similarity.sum())},
  )]


def layer_rows(experts: int, d: int, f: int, repeats: int) -> list[dict[str, Any]]:
  own = layer(experts, d, f)
  rng = np.random.default_rng(1)
  usage = rng.dirichlet(np.ones(experts))
  x = jnp.asarray(rng.standard_normal((_ROWS, d), np.float32))
  choice = jnp.asarray(rng.integers(0, experts, (_ROWS, 1)), jnp.int32)
  gate, mask = jnp.ones((_ROWS, 1)), jnp.ones(_ROWS, bool)
  logits = jnp.asarray(rng.standard_normal((_ROWS, experts), np.float32))
  similarity = np.asarray(similarity_core.weight(own))
  groups = grouping_core.assign(similarity, usage, experts // 4)
  kept = prune_core.keep(usage, experts // 4)
  block = jax.block_until_ready
  steps: dict[str, Any] = {
      'statistics of 8,192 tokens': lambda: block((
          stats_core.routing_sums(logits, choice, gate, mask),
          stats_core.output_sums(x, choice[:, 0], gate[:, 0], mask, experts),
      )),
      'similarity by weights': lambda: block(similarity_core.weight(own)),
      'grouping': lambda: grouping_core.assign(similarity, usage, experts // 4),
      'merging by usage': lambda: block(merge_core.weighted(own, groups.labels, usage)),
      'pruning': lambda: {name: w[kept] for name, w in own.items()},
  }
  case = f'{experts} experts {d}x{f}'
  rows = [
      timing.row(case, metric, 'moejax', seconds, ours=True)
      for metric, seconds in timing.measure(steps, repeats=repeats, warmup=1).items()
  ]
  start = time.perf_counter()
  align_core.in_one_order(own, 0)
  rows.append(timing.row(
      case, 'alignment to one order', 'moejax', [time.perf_counter() - start], ours=True
  ))
  return rows


def main(quick: bool) -> list[dict[str, Any]]:
  rows = statistics_rows(20_000 if quick else 1_000_000, 32, 1 if quick else 5)
  for experts, d, f in _QUICK if quick else LAYERS:
    rows += layer_rows(experts, d, f, 1 if quick else 5)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  rows.append(timing.row('all of these', 'peak memory', 'moejax', [peak], 'bytes', ours=True))
  return rows


if __name__ == '__main__':
  timing.run(main)
