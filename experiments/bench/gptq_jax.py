"""Worker: ternary GPTQ by moejax, the parts of `moejax.gptq` one by one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import gptq_problem, timing
from moejax.compress import gptq_core, grids_core


def factor(h_edd: jax.Array) -> jax.Array:
  """What `gptq` does before it looks at the weights."""
  return gptq_core.factor(h_edd, gptq_core.damping_lambda(h_edd, gptq_problem.DAMPING))[0]


def sweep(w_edf: jax.Array, r_edd: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The rest of `gptq`: symbols, what they stand for, and the damped error."""
  grid = grids_core.find_grid(w_edf, 'ternary')
  symbols, error = gptq_core.sweep_factored(w_edf, r_edd, grid, block_size=gptq_problem.BLOCK)
  return symbols, gptq_core.values_of(grid, symbols), error


def shape_rows(experts: int, shape: tuple[int, int]) -> list[dict[str, Any]]:
  w, h = gptq_problem.problem(experts, *shape)
  w_edf, h_edd = jnp.asarray(np.swapaxes(w, 1, 2)), jnp.asarray(h)
  r_edd = factor(h_edd)
  symbols, _, error = sweep(w_edf, r_edd)
  work = {'damped_error': float(error.sum()), 'zero_share': float((symbols == 0).mean())}
  return gptq_problem.rows(
      shape, experts, 'moejax', lambda: jax.block_until_ready(factor(h_edd)),
      lambda: jax.block_until_ready(sweep(w_edf, r_edd)), work, ours=True,
  )


def main(quick: bool) -> list[dict[str, Any]]:
  experts, shapes = gptq_problem.sizes(quick)
  return [row for shape in shapes for row in shape_rows(experts, shape)]


if __name__ == '__main__':
  timing.run(main)
