"""Worker: forward pass of a dropless switch-base-8 in float32, in evaluation mode."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing
from moejax import config as config_lib
from moejax import model, presets

SMALL = dict(
    vocab_size=96, d_model=16, d_kv=4, d_ff=32, num_heads=4, num_layers=2, num_decoder_layers=2
)


def random_params(config: config_lib.ModelConfig) -> Any:
  """Norms of one, embeddings N(0, 1), all else N(0, 0.03^2), so that routers spread the tokens.

  Quicker than to compile `init_params`.
  """
  rng = np.random.default_rng(0)

  def fill(a):
    if a.ndim == 1:
      return jnp.ones(a.shape, a.dtype)
    scale = 1.0 if a.shape[0] == config.vocab_size else 0.03
    return jnp.asarray(rng.standard_normal(a.shape, np.float32) * np.float32(scale))

  return jax.tree.map(fill, model.abstract_params(config))


def main(quick: bool) -> list[dict[str, Any]]:
  batch, length = (2, 16) if quick else (2, 512)
  sizes: dict[str, Any] = SMALL if quick else {}
  dropless = config_lib.EncDecMoeConfig(num_experts=8)
  base: Any = presets.preset('switch-base-8')
  config = dataclasses.replace(base, moe=dropless, **sizes)
  params = random_params(config)
  tokens = jax.random.randint(jax.random.key(1), (batch, length), 2, config.vocab_size)

  @jax.jit
  def forward(params, x, y):
    out = model.apply_fn(config, params, x, y)
    return out.logits_btv, [r.load_e for r in out.routings.values()]

  call = lambda: jax.block_until_ready(forward(params, tokens, tokens))
  logits, loads = call()
  work = {
      'parameters': sum(a.size for a in jax.tree.leaves(params)),
      'logits': logits.size,
      'tokens_through_experts': sum(int(load_e.sum()) for load_e in loads),
  }
  samples = timing.measure({'forward': call}, repeats=7)['forward']
  case = f'{batch} x {length} encoder and decoder tokens'
  busiest = max(int(load_e.max()) for load_e in loads)
  return [timing.row(
      case, 'forward pass', 'moejax', samples, ours=True, work=work, busiest_expert=busiest
  )]


if __name__ == '__main__':
  timing.run(main)
