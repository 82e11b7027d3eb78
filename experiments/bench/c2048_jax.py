"""Worker: what Switch-c-2048 takes as codes of blocks, and one of its layers scaled down, on CPU.

The rate comes from matrices of its shapes that GPTQ quantized, for inputs whose features hang
together; it is what the whole model's bytes are counted with. Weights and inputs are drawn: the
checkpoint's 3 TB are not read.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from experiments.bench import timing
from moejax import presets, tree, weights
from moejax.account import counts
from moejax.compress import gptq_core, grids_core
from moejax.ops.expert_dot import expert_dot

WIDTHS, SMALL = (2080, 6144), (96, 160)
EXPERTS, TOKENS = 32, 64
H200 = 149.2e9  # Bytes of one H200.
ZERO_SHARE = 0.886  # Published for its experts.


def quantized(d: int, f: int, seed: int) -> weights.BlockTernary:
  """A matrix [1, d, f] after GPTQ with the published share of zeros, in codes of blocks.

  Features of the inputs share factors and differ in size.
  """
  rng = np.random.default_rng(seed)
  factors = rng.standard_normal((max(1, d // 8), d)) * np.exp(0.5 * rng.standard_normal(d))
  x = rng.standard_normal((2 * d, len(factors))) @ factors / np.sqrt(len(factors))
  x += 0.5 * rng.standard_normal(x.shape)
  h = jnp.asarray(x.T @ x / len(x), jnp.float32)[None]
  r, _ = gptq_core.factor(h, gptq_core.damping_lambda(h, 0.1))
  w = jnp.asarray(rng.standard_normal((1, d, f)), jnp.float32)

  def sweep(w, scale):
    grid = grids_core.find_grid(w, 'ternary', grid_scale=scale)
    return gptq_core.sweep_factored(w, r, grid, block_size=128)[0], grid

  low, high = 0.3, 2.5
  for _ in range(8):
    scale = (low + high) / 2
    few = float((sweep(w[..., :256], scale)[0] == 0).mean()) < ZERO_SHARE
    low, high = (scale, high) if few else (low, scale)
  symbols, grid = sweep(w, (low + high) / 2)
  levels = np.stack([np.asarray(a)[:, 0] for a in grids_core.row_levels(grid)], -1)
  return weights.BlockTernary.from_symbols(np.asarray(symbols).swapaxes(1, 2), levels)


def independent(d: int, f: int, experts: int) -> weights.BlockTernary:
  """Experts of independent symbols."""
  rng = np.random.default_rng(0)
  p = [ZERO_SHARE, *[(1 - ZERO_SHARE) / 2] * 2]
  symbols = np.searchsorted(np.cumsum(p), rng.random((experts, f, d), np.float32)).astype(np.uint8)
  levels = np.abs(rng.standard_normal((experts, f, 2))) * [-1, 1]
  return weights.BlockTernary.from_symbols(symbols, levels)


def model_bytes(bits: float) -> float:
  """Of Switch-c-2048 with so many bits a weight of its experts, the rest bfloat16."""
  config = presets.preset('switch-c-2048')
  flat = counts.shapes(config, np.dtype(ml_dtypes.bfloat16))
  whole = counts.summary(tree.unflatten(flat), config)
  experts = whole['expert_parameters']
  return whole['stored_bytes'] - 2 * experts + bits * experts / 8


def zipf(experts: int, tokens: int) -> np.ndarray:
  """int32 [experts], how many tokens each gets where the k-th is chosen as often as 1 / k."""
  p = 1 / np.arange(1, experts + 1)
  return np.random.default_rng(1).multinomial(tokens, p / p.sum()).astype(np.int32)


def main(quick: bool) -> list[dict[str, Any]]:
  d, f = SMALL if quick else WIDTHS
  experts, tokens = (4, 8) if quick else (EXPERTS, TOKENS)
  rows = []

  def add(case, metric, value, unit, peer=None, samples=None):
    rows.append(timing.row(case, metric, 'moejax', samples or [value], unit, ours=True))
    if peer:
      rows.append(timing.row(case, metric, peer[0], [peer[1]], unit, ours=False))

  matrices = {f'{a} -> {b}': quantized(a, b, i) for i, (a, b) in enumerate(((d, f), (f, d)))}
  for name, node in matrices.items():
    add(f'an expert, {name}, after GPTQ', 'bits a weight', node.bits_per_weight(), 'bits a weight')
    zeros = 100 * float((node.symbols() == 0).mean())
    add(f'an expert, {name}, after GPTQ', 'zeros', zeros, '%')
  bits = sum(node.bits() for node in matrices.values()) / (2 * d * f)
  add('all experts', 'bits a weight', bits, 'bits a weight', ('QMoE published', 16 / 20.07))
  size = model_bytes(bits) / 1e9
  add('the whole model', 'stored', size, 'GB', ('QMoE published', 158.6))
  add('the whole model', 'in one H200', size, 'GB', ('all its memory', H200 / 1e9))

  w_in, w_out = (jax.tree.map(jnp.asarray, independent(*s, experts)) for s in ((d, f), (f, d)))
  sizes = jnp.asarray(zipf(experts, tokens))
  x = jax.random.normal(jax.random.key(0), (tokens, d))

  @jax.jit
  def layer(x, w_in, w_out, sizes):
    return expert_dot(jax.nn.relu(expert_dot(x, w_in, sizes)), w_out, sizes)

  seconds = timing.measure(
      {'layer': lambda: jax.block_until_ready(layer(x, w_in, w_out, sizes))}, repeats=5, warmup=1
  )['layer']
  met, scale = int((sizes > 0).sum()), 2048 // experts
  case = f'a layer of {experts} experts, 1 in {scale}, on CPU: {tokens} tokens to {met} of them'
  add(case, 'time', 0.0, 's', samples=seconds)
  add(case, 'of all 30 such layers', 0.0, 'tokens/s', samples=[tokens / 30 / s for s in seconds])
  return rows


if __name__ == '__main__':
  timing.run(main)
