"""Gradients of the experts' weights over calibration batches, for merging and pruning by them."""

from collections.abc import Iterable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from moejax import tree
from moejax.compress import samples, sources, stats, stats_core
from moejax.config import ModelConfig, StackConfig
from moejax.errors import UserError
from moejax.model import Model, apply_fn
from moejax.weights import WeightNode


def measure(
    model: Model, batches: Iterable[Mapping[str, Any]], micro_batch: int = 16,
    mesh: Mesh | None = None,
) -> stats.Statistics:
  """Mean gradients of the cross-entropy, and mean squares of them, by expert weight.

  Fisher information (M-SMoE, arXiv 2310.01334, A) is the mean square with micro_batch = 1; the
  similarity by gradients takes 16. An expert that no token meets has 0. Float64 [e, ...] for each
  weight, twice: as much memory as the experts take in float32, four times.

  Args:
    model: with experts as arrays. batches: as in `compress.samples.collect`.
    micro_batch: examples a gradient; what is left over of a batch is left out.
    mesh: over which the model's params and each micro-batch are sharded.

  Raises:
    UserError: no experts, compressed experts, or no whole micro-batch.
  """
  if model.config.moe is None:
    raise UserError(f'the model has no experts ({model.config.family})')
  flat = tree.flatten(model.params)
  experts = {path: leaf for path, leaf in flat.items() if '/experts/' in path}
  for path, leaf in experts.items():
    if isinstance(leaf, WeightNode):
      raise UserError(f'{path} is a {type(leaf).__name__} node: gradients are of arrays')
  rest = {path: leaf for path, leaf in flat.items() if path not in experts}
  totals: stats_core.Sums = {}
  count = 0
  for piece in _pieces(batches, micro_batch):
    found = _gradients(model.config, experts, rest, piece, mesh)
    totals = stats_core.add(totals, {f'{p}:gradient': g for p, g in found.items()})
    totals = stats_core.add(totals, {f'{p}:square': jnp.square(g) for p, g in found.items()})
    count += 1
  if not count:
    raise UserError(f'no batch has micro_batch = {micro_batch} examples')
  layers: dict[str, stats_core.Sums] = {}
  for key, total in totals.items():
    path, _, name = key.rpartition(':')
    layer, _, weight = path.partition('/experts/')
    layers.setdefault(layer, {})[f'{name}/{weight}'] = total / count
  return stats.Statistics(
      layers=layers, kinds=('gradients',), tokens={},
      model=stats.identity(sources.open_source(model)),
  )


def of_samples(source: Any, data: samples.Samples, micro_batch: int = 16) -> stats.Statistics:
  """`measure` for calibration samples that are taken apart already, of a model read whole."""
  params = tree.unflatten({
      path: jax.tree.map(jnp.asarray, source.read(path)) for path in source.paths()
  })
  return measure(Model(source.config, params), samples.padded(data, micro_batch), micro_batch)


def _pieces(
    batches: Iterable[Mapping[str, Any]], micro_batch: int
) -> Iterable[dict[str, jax.Array]]:
  for batch in batches:
    arrays = {name: np.asarray(a) for name, a in batch.items()}
    size = len(next(iter(arrays.values())))
    for start in range(0, size - micro_batch + 1, micro_batch):
      yield {name: jnp.asarray(a[start : start + micro_batch]) for name, a in arrays.items()}


@functools.partial(jax.jit, static_argnames=('config', 'mesh'))
def _gradients(config: ModelConfig, experts, rest, batch, mesh) -> dict[str, jax.Array]:
  def loss(experts):
    params = tree.unflatten({**rest, **experts})
    return _cross_entropy(config, params, batch, mesh)

  return jax.grad(loss)({path: leaf.astype(jnp.float32) for path, leaf in experts.items()})


def _cross_entropy(config, params, batch, mesh) -> jax.Array:
  """Mean over the weighted positions of a calibration batch."""
  if isinstance(config, StackConfig):
    names = {'segments': 'segments_bt', 'positions': 'positions_bt'}
    inputs = {ours: batch[name] for name, ours in names.items() if name in batch}
    logits = apply_fn(config, params, batch['tokens'], mesh=mesh, **inputs).logits_btv
    own = jnp.roll(batch['tokens'], -1, 1) if config.causal else batch['tokens']
    targets = batch.get('targets', own)
    last = jnp.arange(targets.shape[1]) < targets.shape[1] - (1 if config.causal else 0)
    weights = batch.get('weights', jnp.broadcast_to(last[None], targets.shape))
  else:
    tokens = batch['encoder_tokens']
    logits = apply_fn(
        config, params, tokens, batch['decoder_tokens'], mesh=mesh,
        encoder_mask=tokens != config.pad_id,
    ).logits_btv
    targets, weights = batch['targets'], batch['weights']
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
  own = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
  weights = weights.astype(jnp.float32)
  return -(own * weights).sum() / jnp.maximum(weights.sum(), 1)
