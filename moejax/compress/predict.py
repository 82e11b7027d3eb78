"""dry_run(model, transform): what a compression will weigh, from shapes alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from moejax import account, tree
from moejax.compress import base, sources
from moejax.config import ModelConfig
from moejax.errors import UserError
from moejax.model import Model


class _Shapes:
  """The leaves of a model as the steps so far would leave them."""

  def __init__(self, config: ModelConfig, leaves: Mapping[str, Any]):
    self.config, self.leaves = config, dict(leaves)

  def paths(self) -> tuple[str, ...]:
    return tuple(self.leaves)

  def abstract(self, path: str) -> Any:
    return self.leaves[path]


def dry_run(
    model: Model | ModelConfig | str | Path, transform: base.Transform | base.Chain, *,
    zero_share: float | Mapping[str, float] | None = None, dtype: Any = jnp.bfloat16,
) -> dict[str, Any]:
  """Bytes of a model before and after `compress`, without calibration and without its weights.

  Exact for 2 to 4 bits. Ternary codes depend on the share of zeros: with the right one the size is
  within 1 %, for symbols as independent as GPTQ leaves them. A searched grid is taken to use its
  target_bits in full. What max_error will keep at more bits is not foreseen.

  Args:
    model: a configuration, a moejax folder (its headers are read), or a Model.
    transform: from `quantize`, or a `chain`.
    zero_share: expected share of zeros of ternary weights, of all or by path of the weight; None
      takes it from each matrix's width (`account.expected_zero_share`), which has been within 1 %
      of the size for trained models of width 256 to 1024 and 2 % at 2080.
    dtype: of the uncompressed weights, where model is a configuration.

  Returns:
    {'before', 'after': as in `compress`'s report, their losses None, 'ratio', 'layers': a row for
    each weight that changes: 'path', 'transform', 'form', 'bits_per_weight', 'stored_bytes'}.

  Raises:
    UserError: a zero share is not in [0, 1] or missing, or what `compress` would refuse by shapes.
  """
  if isinstance(model, ModelConfig):
    source: Any = _Shapes(model, account.shapes(model, jnp.dtype(dtype)))
  else:
    source = sources.open_source(model)
  now = _Shapes(source.config, {path: source.abstract(path) for path in source.paths()})
  unknown = {'loss': None}
  before = {**account.of_source(now), **unknown}
  rows = []
  for step in transform.steps if isinstance(transform, base.Chain) else (transform,):
    viewed = step.view(now)
    now = _Shapes(viewed.config, {path: viewed.abstract(path) for path in viewed.paths()})
    leaves = dict(now.leaves)
    for layer in base.target_layers(step, now):
      old = {p.removeprefix(f'{layer}/'): leaf for p, leaf in now.leaves.items()
             if p.startswith(f'{layer}/')}
      made = step.predict_layer(now.config, layer, old, lambda path: _share(zero_share, path))
      leaves = {p: leaf for p, leaf in leaves.items() if not p.startswith(f'{layer}/')}
      leaves |= {f'{layer}/{name}': leaf for name, leaf in made.items()}
    for path in (p for p in leaves if '/experts/' in p and leaves[p] is not now.leaves.get(p)):
      leaf = leaves[path]
      bits = account.stored_bits(leaf)
      rows.append({
          'path': path, 'transform': step.name, 'form': form(leaf),
          'bits_per_weight': bits / tree.count({path: leaf}), 'stored_bytes': -(-bits // 8),
      })
    now = _Shapes(step.reconfigure(now.config, step.foreseen(now.config)), leaves)
  after = {**account.of_source(now), **unknown}
  return {
      'before': before, 'after': after, 'layers': rows,
      'ratio': before['stored_bytes'] / after['stored_bytes'],
  }


def form(leaf: Any) -> str:
  """How a weight is stored: the class of its node, or the dtype of an array."""
  return str(leaf.dtype) if tree.is_array(leaf) else type(leaf).__name__


def _share(zero_share: float | Mapping[str, float] | None, path: str) -> float | None:
  if zero_share is None:
    return None
  if isinstance(zero_share, Mapping):
    if path not in zero_share:
      raise UserError(f'no zero share given for {path}')
    zero_share = zero_share[path]
  if not 0 <= zero_share <= 1:
    raise UserError(f'zero_share = {zero_share}: from 0 to 1')
  return float(zero_share)


def table(result: Mapping[str, Any]) -> str:
  """The result of `dry_run` for a terminal: bytes by part, then the weights that change."""
  before, after = result['before'], result['after']
  lines = [f'{"part":18}{"before":>14}{"after":>14}{"bits/weight":>13}']
  parts = [dict(a['bytes_by_part']) for a in (before, after)]
  for part in dict.fromkeys((*parts[0], *parts[1])):
    bits = f'{after["expert_bits_per_weight"]:13.3f}' if part == 'experts' else ''
    sizes = ''.join(_size(own.get(part, 0)) for own in parts)
    lines.append(f'{part:18}{sizes}{bits}')
  total = 8 * after['stored_bytes'] / after['parameters']
  sizes = _size(before['stored_bytes']) + _size(after['stored_bytes'])
  lines += [f'{"all":18}{sizes}{total:13.3f}', '']
  kinds: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
  for row in result['layers']:
    layer, _, name = row['path'].partition('/experts/')
    kinds.setdefault((f'{layer.split("/")[0]} {name}', row['form']), []).append(row)
  lines.append(f'{"weights":18}{"count":>14}{"stored as":>14}{"bits/weight":>13}')
  for (name, stored), rows in kinds.items():
    mean = sum(row['bits_per_weight'] for row in rows) / len(rows)
    lines.append(f'{name:18}{len(rows):14}{stored:>14}{mean:13.3f}')
  return '\n'.join(lines)


def _size(count: float) -> str:
  return f'{count / 1e9:11,.3f} GB' if count >= 1e9 else f'{count / 1e6:11,.3f} MB'
