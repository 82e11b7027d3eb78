"""Worker: a decoder before and after merging, pruning and decomposing: forward and decoding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing
import moejax
from moejax import account
from moejax.compress import compress, stats
from moejax.config import DecoderConfig, DecoderMoeConfig
from moejax.generate import generate
from moejax.model import Model

CONFIG = DecoderConfig(
    family='mixtral', vocab_size=512, d_model=256, d_head=32, d_ff=1024, num_heads=8,
    num_kv_heads=4, num_layers=4, eos_ids=(1,),
    moe=DecoderMoeConfig(num_experts=16, top_k=2, router='topk', normalize_gates=True),
)
STEPS: dict[str, Any] = {
    'merged to 8': lambda n: moejax.merge(n // 2, budget='uniform', alignment='none'),
    'pruned to 8': lambda n: moejax.prune('frequency', experts=n // 2),
    'decomposed, rank 32 and a tenth': lambda n: moejax.decompose(
        32 if n == 16 else 4, keep=0.1, sensitivity='magnitude'
    ),
}


def statistics_rows(model: Model, quick: bool) -> list[dict[str, Any]]:
  """What REAP and mean outputs cost beside a forward pass over the same tokens."""
  rows, length = (4, 64) if quick else (32, 512)
  tokens = np.random.default_rng(1).integers(3, model.config.vocab_size, (rows, length))
  batches = [{'tokens': tokens[i : i + 8].astype(np.int32)} for i in range(0, rows, 8)]

  def forward():
    for batch in batches:
      jax.block_until_ready(model.apply(jnp.asarray(batch['tokens'])).logits_btv)

  seconds = timing.measure(
      {'moejax': lambda: stats.measure(model, batches), 'a forward pass': forward},
      repeats=1 if quick else 3, warmup=1, budget_s=60.0,
  )
  return [timing.row(
      f'{rows * length:,} tokens', 'statistics for REAP', name, samples, ours=name == 'moejax'
  ) for name, samples in seconds.items()]


def main(quick: bool) -> list[dict[str, Any]]:
  config = CONFIG
  if quick:
    moe: Any = dataclasses.replace(config.moe, num_experts=4)  # type: ignore[type-var]
    config = dataclasses.replace(config, d_model=32, d_ff=64, num_layers=1, moe=moe)
  model = Model.init(config, jax.random.key(0))
  tokens = np.random.default_rng(0).integers(3, config.vocab_size, (1, 64 if quick else 512))
  calibration = [{'tokens': tokens}]
  experts = config.moe.num_experts  # type: ignore[union-attr]
  models = {'the original': model} | {
      name: compress(model, make(experts), calibration).model for name, make in STEPS.items()
  }
  x, prompt = jnp.asarray(tokens, jnp.int32), tokens[0, :32].tolist()
  new = 4 if quick else 32
  calls = {
      'forward pass': {
          name: lambda m=m: jax.block_until_ready(m.apply(x).logits_btv)
          for name, m in models.items()
      },
      f'{new} tokens after 32, greedy': {
          name: lambda m=m: generate(m, [prompt], max_new_tokens=new, stop_ids=())
          for name, m in models.items()
      },
  }
  rows = statistics_rows(model, quick)
  for metric, fns in calls.items():
    seconds = timing.measure(fns, repeats=1 if quick else 7, warmup=1, budget_s=60.0)
    for name in STEPS:
      rows.append(timing.row(name, metric, 'moejax', seconds[name], ours=True))
      rows.append(timing.row(name, metric, 'the original', seconds['the original'], ours=False))
  for name, m in models.items():
    assert m is not None
    flops = account.flops_per_token(m.config, params=m.params)
    rows.append(timing.row(name, 'operations a token', 'moejax', [flops], 'FLOPs', ours=True))
    size = account.summary(m.params, m.config)['stored_bytes']
    rows.append(timing.row(name, 'stored', 'moejax', [size], 'bytes', ours=True))
  return rows


if __name__ == '__main__':
  timing.run(main)
