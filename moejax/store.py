"""The moejax model folder: config.json, manifest.json, safetensors shards, tokenizer files.

manifest.json holds the format version, the class and static fields of every compressed weight
node, where the model comes from, and a size and SHA-256 of each file. A leaf is stored under its
path (`encoder/layers_0/ffn/wi`), a node's arrays under `<path>/<field>`.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import config as config_lib
from moejax import files, safetensors_io, tree, weights
from moejax.errors import UserError, did_you_mean

FORMAT_VERSION = 1
MANIFEST = 'manifest.json'
CONFIG = 'config.json'


def is_folder(folder: Path | str) -> bool:
  """Whether `folder` is a moejax model folder (it has a manifest)."""
  return (Path(folder) / MANIFEST).is_file()


def save_folder(
    folder: Path | str,
    config: config_lib.ModelConfig,
    params: Mapping[str, Any] | Iterable[tuple[str, Any]],
    *,
    provenance: Mapping[str, Any] | None = None,
    plan: Any = None,
    tokenizer_from: Path | str | None = None,
    expected_paths: Iterable[str] | None = None,
    shard_bytes: int = 4 << 30,
) -> None:
  """Writes a model folder, whole or not at all.

  Args:
    folder: where to; an earlier model folder is replaced, anything else there is refused.
    config: written as config.json.
    params: nested dict, or an iterable of (path, leaf) that is consumed one leaf at a time. A leaf
      is an array, a weight node, or a `safetensors_io.Chunked`.
    provenance: JSON values saying where the model comes from.
    plan: JSON values a compression decided on.
    tokenizer_from: a folder whose tokenizer files are copied.
    expected_paths: the paths to come, if known: a tighter file header.
    shard_bytes: a shard is closed before it would grow beyond this.

  Raises:
    UserError: the folder cannot be written, or a tensor holds NaN.
  """
  if isinstance(params, Mapping):
    flat = tree.flatten(params)
    expected_paths = [name for path, leaf in flat.items() for name in _stored_names(path, leaf)]
    params = flat.items()
  nodes: dict[str, Any] = {}
  with files.atomic_folder(folder) as partial:
    files.write_json(partial / CONFIG, config_lib.to_json(config))
    if tokenizer_from is not None:
      files.copy_tokenizer(tokenizer_from, partial)
    expected = None if expected_paths is None else list(expected_paths)
    tensors = _tensors(params, nodes, folder)
    safetensors_io.write_folder(partial, tensors, expected=expected, shard_bytes=shard_bytes)
    manifest = {
        'format': 'moejax',
        'format_version': FORMAT_VERSION,
        'nodes': nodes,
        'plan': plan,
        'provenance': dict(provenance or {}),
        'files': {
            file.name: {'bytes': file.stat().st_size, 'sha256': files.sha256(file)}
            for file in sorted(partial.iterdir())
        },
    }
    files.write_json(partial / MANIFEST, manifest)


def _stored_names(path: str, leaf: Any) -> list[str]:
  if _is_node(leaf):
    return [f'{path}/{field}' for field in leaf.to_arrays()]
  return [path]


def _is_node(leaf: Any) -> bool:
  return isinstance(leaf, weights.WeightNode)


def _tensors(params, nodes, folder):
  for path, leaf in params:
    if _is_node(leaf):
      nodes[path] = {'class': type(leaf).__name__, 'static': leaf.static()}
      for field, array in leaf.to_arrays().items():
        yield f'{path}/{field}', _checked(np.asarray(array), f'{path}/{field}', folder)
    elif isinstance(leaf, safetensors_io.Chunked):
      yield path, leaf
    else:
      yield path, _checked(np.asarray(leaf), path, folder)


def _checked(array: np.ndarray, name: str, where: Path | str) -> np.ndarray:
  safetensors_io.check_finite(array, name, where)
  return array


class Source:
  """A model folder read lazily: each leaf or node on demand, through its own memory map."""

  def __init__(self, folder: Path | str, *, verify: bool = False):
    """Opens the folder and checks manifest, config, file sizes and headers.

    Args:
      folder: a moejax model folder.
      verify: read every file once more to compare its SHA-256 with the manifest's.

    Raises:
      UserError: not a moejax folder, or one of its files is missing, wrong or corrupt.
    """
    self.folder = files.require_folder(folder)
    if not is_folder(self.folder):
      hint = (
          'it looks like a Hugging Face folder: convert it with python -m experiments.convert'
          if (self.folder / CONFIG).is_file() else 'name a folder that moejax wrote'
      )
      raise UserError(f'{self.folder} has no {MANIFEST}; {hint}')
    self.manifest = files.read_json(self.folder / MANIFEST)
    version = self.manifest.get('format_version')
    if version != FORMAT_VERSION or isinstance(version, bool):
      raise UserError(
          f'{self.folder / MANIFEST}: format_version {version!r} is not {FORMAT_VERSION}: '
          'use the version of moejax that wrote it'
      )
    self._check_manifest()
    self._check_files(verify)
    values = files.read_json(self.folder / CONFIG)
    try:
      self.config = config_lib.model_from_json(values)
    except UserError as error:
      raise UserError(f'{self.folder / CONFIG}: {error}') from error
    self._infos = safetensors_io.read_folder(self.folder)
    self._nodes: dict[str, dict[str, Any]] = self.manifest.get('nodes', {})
    self._fields: dict[str, dict[str, safetensors_io.TensorInfo]] = {p: {} for p in self._nodes}
    for name, info in self._infos.items():
      parent, _, field = name.rpartition('/')
      if parent in self._nodes:
        self._fields[parent][field] = info
      else:
        self._fields[name] = {'': info}
    for path, node in self._nodes.items():
      if node.get('class') not in weights.NODE_CLASSES:
        name = str(node.get('class'))
        raise UserError(
            f'{self.folder / MANIFEST}: {path} has the unknown node class {name!r}'
            f'{did_you_mean(name, weights.NODE_CLASSES)}; update moejax'
        )

  def _check_manifest(self) -> None:
    """The parts that are read are there and of their types."""
    wanted: dict[str, dict[str, type]] = {
        'files': {'bytes': int, 'sha256': str}, 'nodes': {'class': str, 'static': dict}
    }
    for part, fields in wanted.items():
      entries = self.manifest.get(part, {} if part == 'nodes' else None)
      if not isinstance(entries, dict):
        raise UserError(f'{self.folder / MANIFEST} lists no {part}: restore the folder')
      for name, entry in entries.items():
        for field, kind in fields.items():
          if not isinstance(entry, dict) or not isinstance(entry.get(field), kind):
            raise UserError(
                f'{self.folder / MANIFEST}: {part}: {name!r} has no proper {field!r}: restore the '
                'folder'
            )
    if not isinstance(self.manifest.get('provenance') or {}, dict):
      raise UserError(f'{self.folder / MANIFEST}: provenance is no object: restore the folder')

  def _check_files(self, verify: bool) -> None:
    listed = self.manifest['files']
    for name, entry in listed.items():
      path = self.folder / name
      if Path(name).name != name or not path.is_file():
        raise UserError(f'{path} is missing: restore the folder it came in')
      size = path.stat().st_size
      if size != entry['bytes']:
        raise UserError(
            f'{path} has {size} bytes, {MANIFEST} says {entry["bytes"]}: '
            'truncated or from another model; restore it'
        )
      if verify and (found := files.sha256(path)) != entry['sha256']:
        raise UserError(
            f'{path} has SHA-256 {found[:12]}…, {MANIFEST} says {entry["sha256"][:12]}…: '
            'corrupt or from another model; restore it'
        )
    for path in (*sorted(self.folder.glob('*.safetensors')), self.folder / CONFIG):
      if path.name not in listed:
        raise UserError(
            f'{path} is not listed in {MANIFEST}: it belongs to another model; restore the folder'
        )

  def paths(self) -> tuple[str, ...]:
    """The paths of all leaves and nodes, in the order of `layers_2` before `layers_10`."""
    return tuple(sorted(self._fields, key=safetensors_io.tensor_sort_key))

  def read(self, path: str, *, check: bool = True) -> Any:
    """One leaf (a read-only NumPy array over a memory map) or one node of such arrays.

    Raises:
      UserError: no such path, or (with `check`) it holds NaN or infinite values.
    """
    fields = self._lookup(path)
    arrays = {field: info.read() for field, info in fields.items()}
    if check:
      for field, array in arrays.items():
        safetensors_io.check_finite(array, fields[field].name, fields[field].file)
    return self._build(path, arrays)

  def read_expert(self, path: str, index: int) -> np.ndarray:
    """Row `index` along the leading axis of a plain leaf, mapping only that row."""
    fields = self._lookup(path)
    if '' not in fields:
      raise UserError(f'{path} in {self.folder} is a {self._nodes[path]["class"]}, not an array')
    return fields[''].row(index)

  def abstract(self, path: str) -> Any:
    """The leaf or node with ShapeDtypeStructs in place of its arrays; reads no weights."""
    fields = self._lookup(path)
    return self._build(
        path, {f: jax.ShapeDtypeStruct(info.shape, info.dtype) for f, info in fields.items()}
    )

  def _lookup(self, path: str) -> dict[str, safetensors_io.TensorInfo]:
    if path not in self._fields:
      raise UserError(f'{self.folder} has no {path!r}{did_you_mean(path, self._fields)}')
    return self._fields[path]

  def _build(self, path: str, arrays: dict[str, Any]) -> Any:
    if path not in self._nodes:
      return arrays['']
    node = self._nodes[path]
    try:
      return weights.NODE_CLASSES[node['class']].from_arrays(node['static'], arrays)
    except (KeyError, TypeError, UserError) as error:
      raise UserError(f'{self.folder}: {path}: {error}') from error


def load_folder(
    folder: Path | str,
    *,
    verify: bool = True,
    place: Callable[[str, Any], Any] | None = None,
) -> tuple[config_lib.ModelConfig, dict[str, Any]]:
  """Reads a model folder: its config and its params.

  Args:
    folder: a moejax model folder.
    verify: compare every file's SHA-256 with the manifest's first.
    place: puts (path, leaf or node of NumPy arrays) on devices; the default copies it to JAX's
      default device. Leaves come one at a time.

  Raises:
    UserError: anything missing, corrupt, mixed up, or NaN, by file and name.
  """
  source = Source(folder, verify=verify)
  # asarray copies once; device_put would alias the file's memory map, and array() copies twice.
  put = place or (lambda _, leaf: jax.block_until_ready(jax.tree.map(jnp.asarray, leaf)))
  flat = {path: put(path, source.read(path)) for path in source.paths()}
  return source.config, tree.unflatten(flat)
