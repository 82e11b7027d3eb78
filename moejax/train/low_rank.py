"""Matrices trained as left right + rest: LoSparse (arXiv 2306.11222, eq. 4) and LoRA (2106.09685).

In the trained tree a matrix at `a/b` becomes `a/b/left`, `a/b/right` and `a/b/rest`; each step
multiplies them out, so that every layer sees a plain matrix. LoSparse starts from the singular
values and prunes the rest while it trains (`train.sparsify`); LoRA starts from nothing, on a rest
that stays as it is.
"""

from collections.abc import Mapping
import re
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moejax import config as config_lib
from moejax import tree, weights
from moejax.errors import UserError
from moejax.train import optim, sparsify
from moejax.weights import lowrank_core

FIELDS = ('left', 'right', 'rest')
# Leading axes that are a batch, and axes that are inputs, of the matrices that are no [d, f].
_AXES: tuple[tuple[str, tuple[int, int]], ...] = (
    (r'.*/experts/.*', (1, 1)),
    (r'.*attention/o', (0, 2)),
    (r'.*', (0, 1)),
)


def split(params: Mapping[str, Any], config: config_lib.LowRankConfig, seed: int) -> dict[str, Any]:
  """The params with every chosen matrix as {'left', 'right', 'rest'}, float32.

  Args:
    params: of a Model, arrays. seed: of a start from 'zeros', by path.

  Raises:
    UserError: no path matches `matrices`, or what matches is no matrix, has no such rank, or is
      no expert's where the rest is pruned.
  """
  if not config.matrices:
    return dict(params)
  flat, out = tree.flatten(params), {}
  for path, leaf in flat.items():
    if not re.fullmatch(config.matrices, path):
      out[path] = leaf
      continue
    for name, part in zip(FIELDS, _parts(path, leaf, config, seed), strict=True):
      out[f'{path}/{name}'] = part
  if len(out) == len(flat):
    raise UserError(
        f'low_rank.matrices = {config.matrices!r} matches none of the paths, such as '
        f'{next(iter(flat))!r}'
    )
  return tree.unflatten(out)


def _parts(path, leaf, config, seed) -> tuple[jax.Array, jax.Array, jax.Array]:
  batch, inputs = tree.first_match(_AXES, path)
  if leaf.ndim <= batch + inputs:
    raise UserError(f'low_rank.matrices: {path} {list(leaf.shape)} is no matrix')
  if config.kept < 1 and '/experts/' not in path:
    raise UserError(
        f'low_rank.kept = {config.kept}: the rest is pruned of experts only, and low_rank.matrices '
        f'matches {path}'
    )
  shape = leaf.shape
  lead, ins, outs = shape[:batch], shape[batch : batch + inputs], shape[batch + inputs :]
  matrix = jnp.asarray(leaf, jnp.float32).reshape(*lead, int(np.prod(ins)), int(np.prod(outs)))
  if not 0 < config.rank <= min(matrix.shape[-2:]):
    raise UserError(
        f'low_rank.rank = {config.rank}: {path} {list(shape)} has ranks from 1 to '
        f'{min(matrix.shape[-2:])}'
    )
  if config.start == 'svd':
    left, right, rest = lowrank_core.split(matrix, config.rank)
  else:
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
    bound = matrix.shape[-2] ** -0.5
    left = jax.random.uniform(key, (*matrix.shape[:-1], config.rank), minval=-bound, maxval=bound)
    right, rest = jnp.zeros((*lead, config.rank, matrix.shape[-1])), matrix
  return (left.reshape(*lead, *ins, config.rank), right.reshape(*lead, config.rank, *outs),
          rest.reshape(shape))


def _scale(config: config_lib.LowRankConfig) -> float:
  return config.alpha / config.rank if config.alpha and config.start == 'zeros' else 1.0


def _gathered(params: Mapping[str, Any]) -> dict[str, Any]:
  """By path: each leaf, or the three parts of a matrix that is split."""
  flat, out = tree.flatten(params), {}
  for path, leaf in flat.items():
    parent, _, name = path.rpartition('/')
    if f'{parent}/rest' not in flat or name not in FIELDS:
      out[path] = leaf
    elif name == 'rest':
      out[parent] = tuple(flat[f'{parent}/{n}'] for n in FIELDS)
  return out


def whole(params: Mapping[str, Any], config: config_lib.LowRankConfig) -> dict[str, Any]:
  """The inverse of `split`: plain matrices, left right (times alpha / rank) + rest."""
  if not config.matrices:
    return dict(params)

  def product(left, right, rest):
    multiply = lambda a, b: jnp.tensordot(a, b, 1, precision='highest')
    for _ in range(left.ndim + right.ndim - 2 - rest.ndim):
      multiply = jax.vmap(multiply)
    return rest + _scale(config) * multiply(left, right).astype(rest.dtype)

  return tree.unflatten({
      path: product(*leaf) if isinstance(leaf, tuple) else leaf
      for path, leaf in _gathered(params).items()
  })


def compact(
    params: Mapping[str, Any], config: config_lib.LowRankConfig, dtype: Any = jnp.float32
) -> dict[str, Any]:
  """Split experts as `LowRankSparse` nodes that keep the outputs whose rest is not all 0.

  On the host; other leaves stay as they are. left takes alpha / rank in.
  """
  out = {}
  for path, leaf in _gathered(params).items():
    if isinstance(leaf, tuple):
      left, right, rest = (np.asarray(a, np.float32) for a in leaf)
      leaf = weights.LowRankSparse.from_dense(
          left * np.float32(_scale(config)), right, rest, (rest != 0).any(1), dtype
      )
    out[path] = leaf
  return tree.unflatten(out)


def finished(params: Mapping[str, Any], config: config_lib.LowRankConfig, dtype: Any) -> Any:
  """What a run leaves: nodes where the rest was pruned, else plain matrices; floats in dtype."""
  if config.matrices and config.kept < 1:
    return tree.cast_floats(compact(params, config, dtype), dtype)
  return tree.cast_floats(whole(params, config), dtype)


def make_optimizer(experiment: config_lib.Experiment, params: Any) -> optax.GradientTransformation:
  """The run's optimizer, with pruning of what is split where `low_rank.kept` asks for it.

  Raises:
    UserError: as `optim.make_optimizer` and `sparsify.Pruning`.
  """
  config, steps = experiment.low_rank, experiment.train.steps
  optimizer = optim.make_optimizer(experiment.optim, steps, params)
  if not config.matrices or config.kept == 1:
    return optimizer
  pruning = sparsify.Pruning(
      steps=steps, kept=config.kept, warmup=config.warmup_steps, settle=config.settle_steps,
      every=config.every, uncertainty=config.uncertainty,
  )
  return sparsify.sparsify(optimizer, pruning, lambda path: path.endswith('/rest'))
