"""Where a compression reads weights from: a model folder, or params in memory."""

from collections.abc import Mapping
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import store, tree
from moejax.config import DecoderMoeConfig, EncDecMoeConfig, ModelConfig, StackConfig
from moejax.config.selection import SelectionConfig
from moejax.errors import UserError
from moejax.model import Model, check_source
from moejax.weights import WeightNode


class MemorySource:
  """Params of a model in memory as a source of single leaves."""

  def __init__(self, model: Model):
    self.config: ModelConfig = model.config
    self._flat = tree.flatten(model.params)

  def paths(self) -> tuple[str, ...]:
    return tuple(self._flat)

  def read(self, path: str) -> Any:
    leaf = self._leaf(path)
    return leaf if isinstance(leaf, WeightNode) else np.asarray(leaf)

  def read_expert(self, path: str, index: int) -> np.ndarray:
    return np.asarray(self._leaf(path)[index])

  def abstract(self, path: str) -> Any:
    return tree.abstract(self._leaf(path))

  def _leaf(self, path: str) -> Any:
    if path not in self._flat:
      raise UserError(f'the model has no parameter {path!r}')
    return self._flat[path]

  def fingerprint(self) -> str:
    digest = hashlib.sha256()
    for path, leaf in self._flat.items():
      arrays = leaf.to_arrays() if isinstance(leaf, WeightNode) else {'': np.asarray(leaf)}
      for field, array in arrays.items():
        digest.update(f'{path}/{field} {array.shape} {array.dtype}'.encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class FolderSource(store.Source):
  """A model folder; its fingerprint is its manifest's list of checksums."""

  def fingerprint(self) -> str:
    return hashlib.sha256(repr(sorted(
        (name, entry['sha256']) for name, entry in self.manifest['files'].items()
    )).encode()).hexdigest()


class Changed:
  """A source whose config is another, its weights as they are."""

  def __init__(self, source: Any, config: ModelConfig):
    self._source, self.config = source, config

  def __getattr__(self, name: str) -> Any:
    return getattr(self._source, name)


def reconfigured(
    source: Any, config: ModelConfig, out_folder: str | Path | None, done: Mapping[str, Any], *,
    origin: str,
) -> Model | None:
  """The model of a source with another config: in memory, or in a folder that says what was done.

  Args:
    done: JSON values, what changed the config. origin: the folder it comes from, or 'memory'.
  """
  leaves = ((path, source.read(path)) for path in source.paths())
  if out_folder is None:
    flat = {path: jax.tree.map(jnp.asarray, leaf) for path, leaf in leaves}
    return Model(config, tree.unflatten(flat))
  provenance: dict[str, Any] = {'source': origin, 'compression': [dict(done)]}
  folder = getattr(source, 'folder', None)
  if folder is not None:
    earlier = source.manifest.get('provenance') or {}
    provenance |= {name: earlier[name] for name in ('trained',) if name in earlier}
  store.save_folder(
      out_folder, config, leaves, provenance=provenance, tokenizer_from=folder,
      expected_paths=source.paths(),
  )
  return None


class OneExpert:
  """A dense model as one whose every layer has a single expert; see `as_one_expert`."""

  def __init__(self, source: Any):
    self._source = source
    self.config = one_expert_config(source.config)
    self._names: dict[str, str] = {}
    for path in source.paths():
      layer, found, name = path.partition('/ffn/')
      if found and name in _INNER:
        self._names[f'{layer}/ffn/experts/{name}'] = path
      else:
        self._names[path] = path

  def __getattr__(self, name: str) -> Any:
    return getattr(self._source, name)

  def paths(self) -> tuple[str, ...]:
    return tuple(self._names)

  def _own(self, path: str) -> str:
    if path not in self._names:
      raise UserError(f'the model has no parameter {path!r}')
    return self._names[path]

  def read(self, path: str) -> Any:
    leaf = self._source.read(self._own(path))
    return np.asarray(leaf)[None] if '/experts/' in path else leaf

  def read_expert(self, path: str, index: int) -> np.ndarray:
    if index:
      raise UserError(f'{path} has one expert, not {index + 1}')
    return np.asarray(self._source.read(self._own(path)))

  def abstract(self, path: str) -> Any:
    leaf = self._source.abstract(self._own(path))
    if '/experts/' in path:
      return jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype)
    return leaf


# What an expert holds of a dense FFN.
_INNER = ('wi', 'gate', 'wo', 'wi_bias', 'gate_bias')


def one_expert_config(config: ModelConfig) -> ModelConfig:
  """A dense model's config with every FFN as one expert that every token meets."""
  selection = SelectionConfig()
  common: dict[str, Any] = dict(
      num_experts=1, top_k=1, router='selection', router_aux_loss_coef=0.0, router_z_loss_coef=0.0
  )
  if isinstance(config, StackConfig):
    return dataclasses.replace(config, moe=DecoderMoeConfig(selection=selection, **common))
  return dataclasses.replace(config, moe=EncDecMoeConfig(
      selection=selection, encoder_sparse_step=1, decoder_sparse_step=1, router_jitter_noise=0.0,
      **common,
  ))


def as_one_expert(source: Any) -> Any:
  """A source of a dense model in the form that steps over experts take; others as they are."""
  return OneExpert(source) if source.config.moe is None else source


def open_source(model: Model | str | Path) -> MemorySource | FolderSource:
  """A source for a Model or a moejax model folder.

  Raises:
    UserError: the folder is not one, or is damaged.
  """
  if isinstance(model, Model):
    return MemorySource(model)
  source = FolderSource(model)
  check_source(source)
  return source


def subtree(source: Any, prefix: str, *, skip: str | None = None) -> Mapping[str, Any]:
  """The leaves under a path as a nested dict, without those under `skip`."""
  flat = {
      path[len(prefix) + 1 :]: source.read(path)
      for path in source.paths()
      if path.startswith(prefix + '/') and not (skip and path.startswith(skip + '/'))
  }
  return tree.unflatten(flat)
