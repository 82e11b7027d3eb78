"""Where a compression reads weights from: a model folder, or params in memory."""

from collections.abc import Mapping
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from moejax import store, tree
from moejax.config import ModelConfig
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
