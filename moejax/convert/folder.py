"""Whole models from and to Hugging Face folders, streamed tensor by tensor."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from moejax import files, safetensors_io, store, tree
from moejax.config import ModelConfig
from moejax.convert import checkpoint, hf_config, rules
from moejax.convert.families import BY_MODEL_TYPE, FAMILIES
from moejax.convert.family import Files
from moejax.errors import UserError, did_you_mean
from moejax.model import Model
from moejax.safetensors_io import Chunked

FORMATS = ('moejax', 'hf')
DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16}

Progress = Callable[[Iterable, int], Iterable]


def entries(config: ModelConfig, found: Files | None = None) -> tuple[rules.Entry, ...]:
  """Every leaf of a model with the Hugging Face tensors it is made of, as found or as written.

  Raises:
    UserError: layers hold different numbers of experts, or merged ones, or skip one.
  """
  if config.moe is not None and config.moe.layer_experts:
    raise UserError(
        f'layers that hold {config.moe.layer_experts} experts'
        f'{" behind an expert map" if config.moe.merged else ""}: transformers knows one number of '
        'experts for all layers, each with its own row of the router; keep the moejax format'
    )
  if config.moe is not None and config.moe.skip:
    raise UserError(
        'transformers cannot skip a second expert (moe.skip): keep the moejax format, or set it '
        'to []'
    )
  family = FAMILIES[config.family]
  return rules.expand(family.rules(config, found), family.sizes(config), family.layers(config))


def _checked_dtype(dtype: Any) -> np.dtype | None:
  """A dtype that weights may be cast to, or None; another one raises UserError."""
  if dtype is None:
    return None
  known = {np.dtype(d): name for name, d in DTYPES.items()}
  try:
    found = np.dtype(DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype)
  except TypeError:
    found = None
  if found not in known:
    raise UserError(f'dtype = {dtype!r}: one of {", ".join(DTYPES)}, or None for what is stored')
  return found


class HfSource:
  """A Hugging Face folder under our paths; leaves are `Chunked`, read when asked for."""

  def __init__(self, folder: Path | str, dtype: Any = None):
    """Opens the folder, reads its config.json and accounts for every tensor.

    Args:
      folder: config.json with safetensors or .bin weights, sharded or not.
      dtype: what leaves are cast to; None keeps what is stored.

    Raises:
      UserError: anything missing, extra, misshapen, unknown or corrupt, by its name.
    """
    self.folder = files.require_folder(folder)
    self._dtype = _checked_dtype(dtype)
    parsed = hf_config.read(self.folder, tuple(sorted(BY_MODEL_TYPE)))
    family = BY_MODEL_TYPE[parsed.model_type]
    try:
      self.config: ModelConfig = family.read_config(parsed.fields)
    except UserError as error:
      where = str(parsed.fields.where)
      raise error if where in str(error) else UserError(f'{where}: {error}') from error
    parsed.fields.finish()
    self._checkpoint = checkpoint.open_folder(self.folder)
    found = Files(parsed.values, self._checkpoint.names())
    self._matches = {
        match.entry.ours: match
        for match in rules.match(entries(self.config, found), self._checkpoint, family.ignored)
    }

  def paths(self) -> tuple[str, ...]:
    return tuple(self._matches)

  def read(self, path: str) -> Chunked:
    """One leaf; its chunks are its experts, or the whole."""
    return rules.read(self._matches[path], self._checkpoint, self._dtype)

  def read_expert(self, path: str, index: int) -> np.ndarray:
    """Row `index` of a leaf that is a stack of tensors."""
    match = self._matches[path]
    dtype = self._dtype or rules.stored_dtype(match, self._checkpoint)
    return rules.read_part(match, index, self._checkpoint, dtype)


def from_hf(
    folder: Path | str, *, dtype: Any = None, place: Callable[[str, np.ndarray], Any] | None = None
) -> Model:
  """Loads a Hugging Face folder of any family in `convert.families` as a Model.

  Peak host memory is the model in its target dtype and one more of its largest leaf.

  Args:
    folder: config.json with safetensors or .bin weights (f32, bf16, f16), sharded or not.
    dtype: of the params; None keeps what is stored.
    place: puts (path, array) on devices; the default is JAX's default device.

  Raises:
    UserError: anything missing, extra, misshapen, unknown or corrupt, by its name.
  """
  source = HfSource(folder, dtype)
  put = place or (lambda _, array: jax.block_until_ready(jax.device_put(array)))
  flat = {path: put(path, source.read(path).assemble()) for path in source.paths()}
  return Model(source.config, tree.unflatten(flat))


def load(folder: Path | str) -> Model:
  """Loads a model folder of either kind: moejax's own, or Hugging Face's."""
  return Model.load(folder) if store.is_folder(folder) else from_hf(folder)


class _Params:
  """A model in memory with the interface of `store.Source`, as far as export needs it."""

  def __init__(self, model: Model):
    self.config = model.config
    self.folder = 'the model'
    self._flat = tree.flatten(model.params)

  def paths(self) -> tuple[str, ...]:
    return tuple(self._flat)

  def abstract(self, path: str) -> Any:
    return self._flat[path]

  def read(self, path: str) -> Any:
    return self._flat[path]

  def read_expert(self, path: str, index: int) -> np.ndarray:
    return np.asarray(self._flat[path][index])


def to_hf(
    model: Model | store.Source,
    folder: Path | str,
    *,
    dtype: Any = None,
    tokenizer_from: Path | str | None = None,
    shard_bytes: int = 4 << 30,
    progress: Progress = lambda items, total: items,
) -> None:
  """Writes a folder that `transformers` loads: config.json and safetensors, whole or not at all.

  Compressed weights are written dense (float32 unless `dtype` says otherwise), expert by expert.

  Raises:
    UserError: the params do not fit the config, transformers has no such model, or the folder
      cannot be written.
  """
  source = _Params(model) if isinstance(model, Model) else model
  config = source.config
  if config.moe is not None and config.moe.selection is not None:
    raise UserError(
        f'Hugging Face has no form of a {config.family} whose layers were split into experts: '
        'moejax.compress.as_dense(model) first, or keep the moejax format'
    )
  if config.cuts is not None or config.activation == 'drelu':
    raise UserError(
        f'Hugging Face has no form of a {config.family} whose activations are cut or are drelu: '
        'keep the moejax format'
    )
  values = FAMILIES[config.family].write_config(config)
  table = entries(config)
  _check_coverage(table, source)
  target = _checked_dtype(dtype)
  stored = target or _dtype_of(source.abstract('shared/embedding'))
  values = {
      'architectures': [FAMILIES[config.family].architecture], **values,
      'model_type': FAMILIES[config.family].model_types[0],
      'dtype': str(stored), 'torch_dtype': str(stored), 'use_cache': True,
  }
  names = [n for e in table for n in (*(n[0] for n in e.names), *e.copies[: e.write_copies * 9])]
  with files.atomic_folder(folder) as partial:
    files.write_json(partial / 'config.json', values)
    if tokenizer_from is not None:
      files.copy_tokenizer(tokenizer_from, partial)
    tensors = (
        pair for e in progress(table, len(table)) for pair in _theirs(e, source, target)
    )
    safetensors_io.write_folder(partial, tensors, expected=names, shard_bytes=shard_bytes)


def _dtype_of(leaf: Any) -> np.dtype:
  return np.dtype(leaf.dtype) if tree.is_array(leaf) else np.dtype(np.float32)


def _check_coverage(table: Iterable[rules.Entry], source: Any) -> None:
  expected = {entry.ours: entry.shape for entry in table}
  missing, extra = tree.differing_paths(expected, source.paths())
  for path in missing:
    raise UserError(
        f'{source.folder}: parameter {path!r} of shape {expected[path]} is missing'
        f'{did_you_mean(path, extra)}'
    )
  for path in extra:
    raise UserError(
        f'{source.folder}: parameter {path!r} of shape {tuple(source.abstract(path).shape)} has no '
        f'place in a Hugging Face {source.config.family} model{did_you_mean(path, expected)}'
    )
  for path, shape in expected.items():
    found = tuple(source.abstract(path).shape)
    if found != shape:
      raise UserError(
          f'{source.folder}: parameter {path!r} has shape {found}, its config wants {shape}'
      )


def _theirs(
    entry: rules.Entry, source: Any, dtype: np.dtype | None
) -> Iterator[tuple[str, np.ndarray]]:
  leaf = source.abstract(entry.ours)
  plain = tree.is_array(leaf)
  cast = dtype or _dtype_of(leaf)
  if not plain or not entry.stacked:
    leaf = source.read(entry.ours)
  for i, (name, *_) in enumerate(entry.names):
    if not entry.stacked:
      array = leaf if plain else leaf.dense(cast)
    else:
      array = source.read_expert(entry.ours, i) if plain else leaf.expert(i, cast)
    array = np.asarray(array).astype(cast, copy=False)
    safetensors_io.check_finite(array, entry.ours, source.folder)
    theirs = entry.to_theirs(array)
    for target in (name, *(entry.copies if entry.write_copies else ())):
      yield target, theirs


def convert_folder(
    source: Path | str,
    out: Path | str,
    *,
    format: str | None = None,
    dtype: str | None = None,
    progress: Progress = lambda items, total: items,
) -> ModelConfig:
  """Converts a model folder, streaming: memory holds about one expert, never the model.

  Args:
    source: a Hugging Face folder or a moejax one.
    out: the folder to write; it must not be `source`.
    format: 'moejax' or 'hf'; None means the other one than `source` has.
    dtype: 'float32', 'bfloat16' or 'float16' for all plain weights; None keeps what is stored.
    progress: wraps an iterable of known length, for a progress bar.

  Returns:
    The model's config.

  Raises:
    UserError: see `HfSource`, `store.Source`, `files.atomic_folder`.
  """
  path = files.require_folder(source)
  ours = store.is_folder(path)
  format = format or ('hf' if ours else 'moejax')
  for value, known in ((format, FORMATS), (dtype or 'float32', DTYPES)):
    if value not in known:
      raise UserError(
          f'unknown choice {value!r}: one of {", ".join(known)}{did_you_mean(value, known)}'
      )
  if Path(out).resolve() == path.resolve():
    raise UserError(f'{out} is the source itself: name another folder to write to')
  numpy_dtype = DTYPES[dtype] if dtype else None
  if not ours and format == 'moejax':
    hf = HfSource(path, numpy_dtype)
    leaves = ((p, hf.read(p)) for p in progress(hf.paths(), len(hf.paths())))
    store.save_folder(
        out, hf.config, leaves, tokenizer_from=path, expected_paths=hf.paths(),
        provenance=_provenance(path, hf.config),
    )
    return hf.config
  if ours and format == 'moejax':
    kept = store.Source(path, verify=True)
    paths = progress(kept.paths(), len(kept.paths()))
    pairs = ((p, _cast(kept.read(p), numpy_dtype)) for p in paths)
    store.save_folder(
        out, kept.config, pairs, tokenizer_from=path, plan=kept.manifest.get('plan'),
        provenance=kept.manifest.get('provenance'),
    )
    return kept.config
  opened: Any = store.Source(path, verify=True) if ours else _Streamed(HfSource(path, numpy_dtype))
  to_hf(opened, out, dtype=numpy_dtype, tokenizer_from=path, progress=progress)
  return opened.config


def _provenance(folder: Path, config: ModelConfig) -> Mapping[str, Any]:
  return {
      'converted_from': folder.resolve().name, 'format': 'hugging_face',
      'model_type': FAMILIES[config.family].model_types[0],
  }


def _cast(leaf: Any, dtype: Any) -> Any:
  floating = tree.is_array(leaf) and leaf.dtype in tuple(np.dtype(d) for d in DTYPES.values())
  return leaf.astype(dtype) if dtype is not None and floating else leaf


class _Streamed:
  """A Hugging Face source with the interface of `store.Source`: for .bin to safetensors."""

  def __init__(self, source: HfSource):
    self._source = source
    self.config, self.folder = source.config, source.folder
    self.paths = source.paths

  def abstract(self, path: str) -> Any:
    leaf = self._source.read(path)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

  def read(self, path: str) -> np.ndarray:
    return self._source.read(path).assemble()

  def read_expert(self, path: str, index: int) -> np.ndarray:
    return self._source.read_expert(path, index)
