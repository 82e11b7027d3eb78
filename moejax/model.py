"""Model: a configuration and its params as one pytree."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moejax import sharding, store, tree
from moejax.config import ModelConfig
from moejax.errors import UserError, did_you_mean
from moejax.nn.switch import Output, SwitchTransformer


def apply_fn(
    config: ModelConfig,
    params: Any,
    encoder_tokens: jax.Array,
    decoder_tokens: jax.Array,
    *,
    encoder_mask: jax.Array | None = None,
    decoder_mask: jax.Array | None = None,
    train: bool = False,
    key: jax.Array | None = None,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    remat: bool = False,
) -> Output:
  """Runs the encoder-decoder: a pure function of params and tokens.

  Args:
    config: which model the params belong to.
    params: nested dict of arrays or weight nodes.
    encoder_tokens: int32 [b, s]. decoder_tokens: int32 [b, t], already shifted right.
    encoder_mask, decoder_mask: bool, True for real tokens; None when nothing is padding.
    train: dropout and router jitter; needs `key`.
    dtype: of activations; the router, norms, softmax and logits stay float32.
    mesh: shards the batch and the experts; None runs on one device.
    remat: recompute each layer in the backward pass.
  """
  module = SwitchTransformer(config, mesh, train, remat, jnp.dtype(dtype))
  rngs = None
  if train:
    if key is None:
      raise ValueError('train=True needs a key for dropout and router jitter')
    rngs = {'dropout': jax.random.fold_in(key, 0), 'router': jax.random.fold_in(key, 1)}
  output: Any = module.apply(
      {'params': params}, encoder_tokens, decoder_tokens, encoder_mask, decoder_mask, rngs=rngs
  )
  return output


def init_params(config: ModelConfig, key: jax.Array) -> Any:
  """Random float32 params, T5's initialisation."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  return SwitchTransformer(config).init(key, tokens, tokens)['params']


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> Any:
  """Shapes and dtypes of a model's params; nothing is allocated."""
  params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), params)


@functools.lru_cache(maxsize=16)
def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  return {path: leaf.shape for path, leaf in tree.flatten(abstract_params(config)).items()}


def check_source(source: store.Source) -> None:
  """Raises UserError unless a folder's weights are the ones that its config.json describes."""
  wanted = _shapes(source.config)
  missing, extra = tree.differing_paths(wanted, source.paths())
  mixed = 'config.json and the weights are of different models: restore the folder'
  if missing:
    hint = did_you_mean(missing[0], extra)
    raise UserError(
        f'{source.folder}: {missing[0]!r} of shape {wanted[missing[0]]} is missing{hint}; {mixed}'
    )
  if extra:
    hint = did_you_mean(extra[0], wanted)
    raise UserError(f'{source.folder}: {extra[0]!r} is one too many{hint}; {mixed}')
  for path, shape in wanted.items():
    found = tuple(source.abstract(path).shape)
    if found != shape:
      raise UserError(
          f'{source.folder}: {path!r} has shape {found}, config.json wants {shape}; {mixed}'
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
  """A configuration (static) and its params (arrays or weight nodes)."""

  config: ModelConfig = dataclasses.field(metadata=dict(static=True))
  params: Any

  @classmethod
  def init(cls, config: ModelConfig, key: jax.Array) -> 'Model':
    return cls(config, init_params(config, key))

  @classmethod
  def abstract(cls, config: ModelConfig, dtype: Any = jnp.float32) -> 'Model':
    return cls(config, abstract_params(config, dtype))

  def apply(self, encoder_tokens: jax.Array, decoder_tokens: jax.Array, **kwargs) -> Output:
    """See `apply_fn`."""
    return apply_fn(self.config, self.params, encoder_tokens, decoder_tokens, **kwargs)

  @classmethod
  def load(cls, folder: str | pathlib.Path, mesh: Mesh | None = None) -> 'Model':
    """Reads a moejax model folder; raises UserError if any part of it is wrong.

    With a mesh, each parameter and each array of a weight node goes straight to where
    `sharding.param_specs` says.
    """
    check_source(store.Source(folder))
    if mesh is None:
      return cls(*store.load_folder(folder))
    place = lambda path, leaf: sharding.place_leaf(path, leaf, mesh)
    return cls(*store.load_folder(folder, place=place))

  def save(self, folder: str | pathlib.Path, **kwargs) -> None:
    """Writes a moejax model folder; see `store.save_folder`."""
    store.save_folder(folder, self.config, self.params, **kwargs)
