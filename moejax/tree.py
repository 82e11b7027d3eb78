"""Params as nested dicts with 'a/b/c' paths: flatten, replace, rules, casts that spare nodes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import re
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from moejax.errors import UserError, did_you_mean

V = TypeVar('V')


def flatten(params: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Maps 'a/b/c' to each leaf; anything that is not a dict (so a weight node too) is a leaf."""
  flat: dict[str, Any] = {}
  for name, value in params.items():
    path = f'{prefix}/{name}' if prefix else name
    if isinstance(value, Mapping):
      flat.update(flatten(value, path))
    else:
      flat[path] = value
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten`."""
  params: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, last = path.split('/')
    node = params
    for part in parents:
      node = node.setdefault(part, {})
    node[last] = value
  return params


def get(params: Mapping[str, Any], path: str) -> Any:
  """The leaf or sub-dict at a path; an unknown one raises UserError with the nearest name."""
  node: Any = params
  for part in path.split('/'):
    if not isinstance(node, Mapping) or part not in node:
      raise UserError(f'no parameter {path!r}{did_you_mean(path, flatten(params))}')
    node = node[part]
  return node


def replace(params: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
  """A copy of params with the leaf or sub-dict at `path` replaced."""
  head, _, rest = path.partition('/')
  if head not in params:
    raise UserError(f'no parameter {path!r}{did_you_mean(path, flatten(params))}')
  return {
      name: (replace(old, rest, value) if rest else value) if name == head else old
      for name, old in params.items()
  }


def norm(params: Any) -> jax.Array:
  """The L2 norm of all arrays together, float32 []."""

  def square(x):
    # Behind a barrier it is not the square that an optimizer wants, which XLA would store for both.
    return jnp.sum(jnp.square(jax.lax.optimization_barrier(x).astype(jnp.float32)))

  squares = map(square, jax.tree.leaves(params))
  return jnp.sqrt(sum(squares, jnp.float32(0)))


def first_match(rules: Sequence[tuple[str, V]], path: str) -> V:
  """The value of the first rule whose regex matches the whole path; none raises UserError."""
  for pattern, value in rules:
    try:
      if re.fullmatch(pattern, path):
        return value
    except re.error as error:
      raise UserError(f'{pattern!r} is no regular expression: {error}') from error
  raise UserError(f'no rule matches parameter {path!r}; end the rules with (".*", ...)')


def map_paths(fn: Callable[[str, Any], Any], params: Mapping[str, Any]) -> dict[str, Any]:
  """Applies fn(path, leaf) to every leaf, weight nodes taken whole."""
  return unflatten({path: fn(path, leaf) for path, leaf in flatten(params).items()})


def is_array(leaf: Any) -> bool:
  """Whether a leaf is a plain array (or its shape), not a weight node."""
  return hasattr(leaf, 'dtype') and hasattr(leaf, 'ndim')


def split_floats(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """What can be trained and what cannot: leaves of floats; the others (a layer's expert map)."""
  flat = flatten(params)
  floats = {
      path: leaf for path, leaf in flat.items()
      if not is_array(leaf) or jnp.issubdtype(leaf.dtype, jnp.inexact)
  }
  if len(floats) == len(flat):
    return dict(params), {}
  return unflatten(floats), unflatten({p: a for p, a in flat.items() if p not in floats})


def join(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
  """The leaves of both: the inverse of `split_floats`."""
  return unflatten({**flatten(a), **flatten(b)}) if b else dict(a)


def cast_floats(params: Any, dtype: Any) -> Any:
  """Casts floating arrays to dtype; weight nodes keep their codes and levels untouched."""

  def cast(leaf):
    if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf.astype(dtype)
    return leaf

  return map_paths(lambda _, leaf: cast(leaf), params)


def abstract(params: Any) -> Any:
  """ShapeDtypeStructs in place of arrays, inside weight nodes too."""
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)


def is_abstract(params: Any) -> bool:
  """Whether an array has a shape and no values."""
  return any(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(params))


def count(params: Any) -> int:
  """Logical parameters: a weight node counts the weights it stands for."""
  total = 0
  for leaf in flatten(params).values():
    size = 1
    for n in leaf.shape:
      size *= n
    total += size
  return total


def differing_paths(a: Iterable[str], b: Iterable[str]) -> tuple[list[str], list[str]]:
  """Paths only in a, and only in b."""
  left, right = set(a), set(b)
  return sorted(left - right), sorted(right - left)
