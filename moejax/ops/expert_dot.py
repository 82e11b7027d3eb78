"""expert_dot: the one place that looks at the class of an expert weight."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.ops import grouped

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
  implementation = _IMPLEMENTATIONS.get(type(w), dense_expert_dot)
  return implementation(x_md, w, group_sizes_e)


def _on_cpu(cpu: Callable[..., jax.Array], other: Callable[..., jax.Array], *args) -> jax.Array:
  return jax.lax.platform_dependent(*args, cpu=cpu, default=other)


@jax.custom_vjp
def dense_expert_dot(x_md: jax.Array, w_edf: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
  """`expert_dot` for a dense array: the expert loop on CPU, `ragged_dot` elsewhere."""

  def loop(x, w, sizes):
    pick = lambda e: jax.lax.dynamic_index_in_dim(w, e, 0, keepdims=False)
    return grouped.grouped_matmul(x, pick, sizes, w.shape[2])

  return _on_cpu(loop, _ragged, x_md, w_edf, group_sizes_e)


def _ragged(x_md, w_edf, group_sizes_e):
  y = jax.lax.ragged_dot(
      x_md, w_edf.astype(x_md.dtype), group_sizes_e, preferred_element_type=jnp.float32
  )
  inside = (jnp.arange(x_md.shape[0]) < group_sizes_e.sum())[:, None]
  return jnp.where(inside, y, 0.0).astype(x_md.dtype)


def _fwd(x_md, w_edf, group_sizes_e):
  return dense_expert_dot(x_md, w_edf, group_sizes_e), (x_md, w_edf, group_sizes_e)


def _bwd(residuals, dy_mf):
  x_md, w_edf, group_sizes_e = residuals

  def loop_dx(x, w, sizes, dy):
    pick = lambda e: jax.lax.dynamic_index_in_dim(w, e, 0, keepdims=False)
    return grouped.grouped_matmul(dy, pick, sizes, w.shape[1], transpose=True)

  def loop_dw(x, w, sizes, dy):
    return grouped.grouped_outer(x, dy, sizes, w.dtype)

  def ragged_dx(x, w, sizes, dy):
    return jax.vjp(lambda a: _ragged(a, w, sizes), x)[1](dy)[0]

  def ragged_dw(x, w, sizes, dy):
    return jax.vjp(lambda b: _ragged(x, b, sizes), w)[1](dy)[0]

  args = (x_md, w_edf, group_sizes_e, dy_mf)
  return (
      _on_cpu(loop_dx, ragged_dx, *args),
      _on_cpu(loop_dw, ragged_dw, *args),
      np.zeros(group_sizes_e.shape, jax.dtypes.float0),
  )


dense_expert_dot.defvjp(_fwd, _bwd)
