"""upcycle(model, ...): a dense model's FFNs as copies of themselves behind new routers.

Sparse upcycling (arXiv 2212.05055) starts the training of a mixture of experts from a dense model:
every expert of a layer is its FFN, the router is random, everything else stays. With gates that sum
to 1 the model computes at first what it did. It grows: nothing is compressed. A llama or mistral
becomes a mixtral, whose Hugging Face files have experts in every layer: every=1 for those.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moejax import tree
from moejax.config import (
  DecoderConfig,
  DecoderMoeConfig,
  EncDecConfig,
  EncDecMoeConfig,
  ModelConfig,
)
from moejax.errors import UserError
from moejax.model import Model

# Of a decoder's family, the one whose files hold experts.
FAMILIES = {'llama': 'mixtral', 'mistral': 'mixtral', 'qwen2': 'qwen2_moe', 'qwen3': 'qwen3_moe'}


def upcycle(
    model: Model, experts: int, *, top_k: int = 2, every: int = 2, std: float = 0.02,
    key: jax.Array | None = None, noise: float = 0.0, **settings: Any,
) -> Model:
  """A model with `experts` copies of the FFN in every `every`-th layer.

  Args:
    model: dense: a T5, or a decoder without biases in its FFNs.
    top_k: experts of a token; their gates sum to 1.
    every: 2 for every other layer, from the second on; 1 for all.
    std: of the routers' normal weights. key: for these and the noise; None for a fixed one.
    noise: standard deviation of what is added to each copy, times that of the weight; 0 leaves them
      alike until training parts them.
    settings: others of the sparse layers' config (`router_aux_loss_coef`, ...).

  Raises:
    UserError: a model with experts, or with biases that experts have no place for; settings that
      do not fit.
  """
  config = _config(model.config, experts, top_k, every, settings)
  key, routers = jax.random.split(jax.random.key(0) if key is None else key)
  flat: dict[str, Any] = {}
  sparse = {f'{stack}/layers_{i}/ffn' for stack in config.stacks
            for i in config.sparse_layers(stack)}
  for n, (path, leaf) in enumerate(tree.flatten(model.params).items()):
    layer, _, name = path.rpartition('/')
    if layer not in sparse or name not in ('wi', 'gate', 'wo'):
      flat[path] = leaf
      continue
    copies = jnp.broadcast_to(leaf[None], (experts, *leaf.shape))
    if noise:
      drawn = jax.random.normal(jax.random.fold_in(key, n), copies.shape, jnp.float32)
      copies = (copies + noise * jnp.std(leaf) * drawn).astype(leaf.dtype)
    flat[f'{layer}/experts/{name}'] = copies
    if name == 'wi':
      drawn = jax.random.normal(
          jax.random.fold_in(routers, n), (config.d_model, experts), jnp.float32
      )
      flat[f'{layer}/router/kernel'] = (std * drawn).astype(leaf.dtype)
  return Model(config, tree.unflatten(flat))


def _config(config: ModelConfig, experts, top_k, every, settings) -> ModelConfig:
  if config.moe is not None:
    raise UserError(f'the {config.family} model has experts already: upcycle takes dense ones')
  if getattr(config, 'ffn_bias', False):
    raise UserError(f'the FFNs of this {config.family} have biases; experts have no place for them')
  if every < 1:
    raise UserError(f'every = {every}: 1 for all layers, 2 for every other one')
  common: dict[str, Any] = dict(
      num_experts=experts, top_k=top_k, router='topk', normalize_gates=True
  )
  if isinstance(config, DecoderConfig):
    moe = DecoderMoeConfig(**{**common, 'sparse_step': every, **settings})
    return dataclasses.replace(config, family=FAMILIES.get(config.family, config.family), moe=moe)
  if not isinstance(config, EncDecConfig):
    raise UserError(f'a {config.family} has no form with experts: upcycle a T5 or a decoder')
  own = {'encoder_sparse_step': every, 'decoder_sparse_step': every, 'router_jitter_noise': 0.0}
  return dataclasses.replace(
      config, family='switch', moe=EncDecMoeConfig(**{**common, **own, **settings})
  )
