"""Model: a configuration and its params as one pytree."""

from collections.abc import Mapping
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from moejax import sharding, store, tree
from moejax.config import ModelConfig, StackConfig
from moejax.errors import UserError, did_you_mean
from moejax.nn import decoder, switch
from moejax.nn.outputs import Output


@functools.partial(
    jax.jit, static_argnames=(
        'config', 'train', 'dtype', 'mesh', 'remat', 'microbatches', 'keep_states', 'observe'
    )
)
def apply_fn(
    config: ModelConfig,
    params: Any,
    *tokens: jax.Array,
    train: bool = False,
    key: jax.Array | None = None,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    remat: bool = False,
    **inputs: Any,
) -> Output:
  """Runs a model: a pure function of params and tokens, compiled for each config and shape.

  Args:
    config: which model the params belong to.
    params: nested dict of arrays or weight nodes.
    tokens: of an encoder-decoder, encoder_tokens int32 [b, s] and decoder_tokens int32 [b, t], the
      latter shifted right already; of a decoder, tokens int32 [b, t].
    train: dropout, router noise and sampling; needs `key`.
    dtype: of activations; the router, norms, softmax and logits stay float32.
    mesh: shards the batch and the experts; None runs on one device.
    remat: recompute each layer in the backward pass.
    inputs: of an encoder-decoder, encoder_mask and decoder_mask, bool, True for real tokens; of a
      decoder, positions_bt (default 0, 1, ...), segments_bt (packed documents by number, which do
      not see each other; within each, positions grow), valid_bt (True for real tokens), draws (a
      router's recorded random numbers, by layer path), types_bt (an encoder's kinds of tokens,
      default 0) and microbatches (of a pipeline; 0: as many as stages). Of all, keep_states: True
      for the hidden states of all layers in the output, and observe: True for the activity of dense
      FFNs. All may be left out. Params may be stacked (`nn.stacking`).
  """
  if train and key is None:
    raise ValueError('train=True needs a key for dropout and routing')
  _check_tokens(config, tokens)
  run: Any = decoder.forward if isinstance(config, StackConfig) else switch.forward
  return run(
      config, params, *tokens, key=key if train else None, dtype=jnp.dtype(dtype), mesh=mesh,
      remat=remat, **inputs,
  )


def _check_tokens(config: ModelConfig, tokens: tuple[jax.Array, ...]) -> None:
  """Raises UserError unless there are as many token arrays as stacks, all of one batch size."""
  shapes = [tuple(a.shape) for a in tokens]
  names = ', '.join(f'{stack} tokens' for stack in config.stacks)
  fits = len(shapes) == len(config.stacks) and all(len(s) == 2 and 0 not in s for s in shapes)
  if not fits or len({s[0] for s in shapes}) != 1:
    raise UserError(
        f'a {config.family} model takes {names} of shape [batch, length], one batch size and '
        f'nothing empty; found {", ".join(map(str, shapes)) or "none"}'
    )


def forward(
    config: ModelConfig,
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    key: jax.Array | None = None,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    remat: bool = False,
    **options: Any,
) -> Output:
  """`apply_fn` on a batch as `moejax.data` lays it out, its padding masked.

  With a key in training mode. An encoder-decoder's batch has encoder_tokens, decoder_tokens and
  weights; a decoder's has tokens, segments and positions.
  """
  run = functools.partial(
      apply_fn, config, params, train=key is not None, key=key, dtype=dtype, mesh=mesh, remat=remat,
      **options,
  )
  if isinstance(config, StackConfig):
    return run(
        batch['tokens'], positions_bt=batch['positions'], segments_bt=batch['segments'],
        valid_bt=batch['segments'] > 0,
        **({'types_bt': batch['types']} if 'types' in batch else {}),
    )
  skip = config.moe is not None and config.moe.router_ignore_padding_tokens
  skip = skip or options.get('observe', False)
  return run(
      batch['encoder_tokens'], batch['decoder_tokens'],
      encoder_mask=batch['encoder_tokens'] != config.pad_id,
      decoder_mask=batch['weights'] > 0 if skip else None,
  )


def init_params(config: ModelConfig, key: jax.Array) -> Any:
  """Random float32 params: T5's initialisation, or one standard deviation for a decoder."""
  if isinstance(config, StackConfig):
    return decoder.init(config, key)
  return switch.init(config, key)


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> Any:
  """Shapes of a model's params, in `dtype` unless they are integers; nothing is allocated."""
  params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
  own = lambda a: dtype if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, own(a)), params)


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
  for path in wanted:
    layer, found, _ = path.rpartition('/expert_map')
    if found and not _leads(source.read(path), wanted[f'{layer}/experts/wi'][0]):
      raise UserError(
          f'{source.folder}: {path!r} leads to experts that the layer does not hold: 0 to '
          f"{wanted[f'{layer}/experts/wi'][0] - 1}; restore the folder"
      )


def _leads(expert_map: np.ndarray, held: int) -> bool:
  """Whether a layer's map is of integers in range."""
  whole = np.issubdtype(np.asarray(expert_map).dtype, np.integer)
  return bool(whole and (expert_map >= 0).all() and (expert_map < held).all())


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

  def apply(self, *tokens: jax.Array, **kwargs) -> Output:
    """See `apply_fn`."""
    return apply_fn(self.config, self.params, *tokens, **kwargs)

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
