"""expert_dot: the one place that looks at the class of an expert weight."""

from collections.abc import Callable
from typing import Any

import jax

from kernels_pallas.grouped_matmul import vjp as grouped

_IMPLEMENTATIONS: dict[type, Callable[[jax.Array, Any, jax.Array], jax.Array]] = {}


def register(node_class: type):
  """Registers fn(x_md, node, group_sizes_e) -> [m, f] for a weight node class."""

  def add(fn):
    _IMPLEMENTATIONS[node_class] = fn
    return fn

  return add


def expert_dot(x_md: jax.Array, w: Any, group_sizes_e: jax.Array) -> jax.Array:
  """Multiplies rows sorted by expert with their expert's matrix.

  Args:
    x_md: [m, d], the rows of expert 0 first.
    w: [e, d, f] array, or a weight node of that logical shape.
    group_sizes_e: int32 [e]; rows past their sum give 0.

  Returns [m, f] in x's dtype, accumulated in float32. Differentiable in x, and in w if an array.
  """
  if w.shape[1] != x_md.shape[-1] or w.shape[0] != group_sizes_e.shape[0]:
    raise ValueError(
        f'expert_dot: x {x_md.shape} and group sizes {group_sizes_e.shape} do not fit '
        f'weights {w.shape} [e, d, f]'
    )
  implementation = _IMPLEMENTATIONS.get(type(w), grouped.grouped_matmul)
  return implementation(x_md, w, group_sizes_e)
