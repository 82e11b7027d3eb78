"""Worker: ternary GPTQ of 16 experts by moejax, factorisation and sweep timed apart."""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing
from moejax.compress import gptq_core, grids_core

EXPERTS, SHAPES, REPEATS = 16, ((768, 3072), (3072, 768)), 2


def problem(outputs: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
  """Weights [e, outputs, inputs] and Hessians [e, inputs, inputs], the same for every peer."""
  rng = np.random.default_rng(0)
  w = rng.standard_normal((EXPERTS, outputs, inputs), np.float32)
  x = rng.standard_normal((512, inputs), np.float32)
  shared = x.T @ x / 512 + np.eye(inputs, dtype=np.float32)
  scale = np.linspace(0.5, 2.0, EXPERTS, dtype=np.float32)[:, None, None]
  return w, shared[None] * scale


def main() -> None:
  rows = []
  for outputs, inputs in SHAPES:
    w, h = problem(outputs, inputs)
    w_edf, h_edd = jnp.asarray(np.swapaxes(w, 1, 2)), jnp.asarray(h)
    times = []
    for _ in range(REPEATS + 1):
      start = time.perf_counter()
      lam = gptq_core.damping_lambda(h_edd, 0.1)
      r, _ = jax.block_until_ready(gptq_core.factor(h_edd, lam))
      middle = time.perf_counter()
      grid = grids_core.find_grid(w_edf, 'ternary')
      jax.block_until_ready(gptq_core.sweep_factored(w_edf, r, grid))
      times.append((middle - start, time.perf_counter() - middle))
    factor_ms, sweep_ms = (statistics.median(t) * 1e3 for t in zip(*times[1:]))
    rows.append({
        'bench': f'GPTQ ternary, 16 experts, {outputs}x{inputs} (rows x columns)',
        'implementation': f'moejax, jax {jax.__version__}', 'median_ms': factor_ms + sweep_ms,
        'factorisation_ms': factor_ms, 'outside_factorisation_ms': sweep_ms,
    })
  timing.emit(rows)


if __name__ == '__main__':
  main()
