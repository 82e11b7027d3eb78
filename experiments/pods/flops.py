"""Operations of a traced program, loops counted as often as they run (XLA counts them once)."""

import math
from typing import Any

from jax.experimental import pallas as pl
from jax.extend import core


def matmul_flops(jaxpr: core.Jaxpr, filled: float = 1.0) -> float:
  """Operations of all matrix products in a jaxpr, over all devices of the regions it is split into.

  A scan counts as often as it runs, a loop of unknown length once, of branches the dearest one. A
  kernel counts what it declares, times the share of its rows that are `filled`: the grouped
  products declare their whole buffers and skip the tiles without rows. One that declares nothing,
  as JAX's attention, counts the products of every step of its grid, those that it skips too.
  """
  return sum(_equation(equation, filled) for equation in jaxpr.eqns)


def filled_share(exchange_factor: float | None, ways: int) -> float:
  """Rows in use of the buffers of experts that lie on `ways` devices, under even routing.

  Gathering (None), or buffers for any routing (0), hold the tokens of all those devices.
  """
  return 1.0 / min(exchange_factor or ways, ways)


def _equation(equation: core.JaxprEqn, filled: float) -> float:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contract, _), _ = params['dimension_numbers']
    left: Any = equation.invars[0].aval
    output: Any = equation.outvars[0].aval
    return 2.0 * math.prod(output.shape) * math.prod(left.shape[axis] for axis in contract)
  if name == 'pallas_call':
    cost: pl.CostEstimate | None = params['cost_estimate']
    if cost:
      return filled * float(cost.flops)
    return math.prod(params['grid_mapping'].grid) * matmul_flops(params['jaxpr'], filled)
  inner = [matmul_flops(jaxpr, filled) for value in params.values() for jaxpr in _jaxprs(value)]
  if name == 'scan':
    return params['length'] * sum(inner)
  if name == 'cond':
    return max(inner)
  if name == 'shard_map':
    split = params['newly_manual_axes']
    return sum(inner) * math.prod(params['mesh'].shape[axis] for axis in split)
  return sum(inner)


def _jaxprs(value: Any) -> list[core.Jaxpr]:
  """The programs in a parameter of an equation."""
  if isinstance(value, core.ClosedJaxpr):
    return [value.jaxpr]
  if isinstance(value, core.Jaxpr):
    return [value]
  if isinstance(value, (tuple, list)):
    return [jaxpr for item in value for jaxpr in _jaxprs(item)]
  return []
