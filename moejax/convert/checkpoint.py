"""Reading the weights of a Hugging Face folder, safetensors or .bin, one tensor at a time."""

from collections.abc import Mapping
from pathlib import Path
import re
from typing import Any
import warnings

import ml_dtypes
import numpy as np

from moejax import safetensors_io
from moejax.errors import UserError, did_you_mean
from moejax.safetensors_io import TensorInfo

SAFE_INDEX, SAFE = safetensors_io.INDEX, 'model.safetensors'
BIN_INDEX, BIN = 'pytorch_model.bin.index.json', 'pytorch_model.bin'
# What wrappers and base-model classes put before every name.
_PREFIXES = ('module.', '_orig_mod.', 'model.', 'switch_transformers.', 'transformer.')
_ZIP_MAGIC = b'PK\x03\x04'
_FLOATS = tuple(np.dtype(d) for d in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64))


class Checkpoint:
  """The tensors of one folder by name; nothing is read before `read`."""

  def __init__(self, where: Path | str, infos: Mapping[str, Any]):
    self.where = where
    self._infos = _strip_prefixes(dict(infos))

  def names(self) -> tuple[str, ...]:
    return tuple(self._infos)

  def info(self, name: str) -> TensorInfo:
    return self._infos[name]

  def require_float(self, name: str) -> None:
    """Raises UserError for a tensor that holds no floats."""
    if (dtype := self.info(name).dtype) not in _FLOATS:
      raise UserError(
          f'{self.where}: tensor {name!r} is {dtype}, not float32, bfloat16 or float16: '
          'convert the unquantized model'
      )

  def read(self, name: str) -> np.ndarray:
    """The tensor, memory-mapped where the file allows it."""
    return self._infos[name].read()

  def read_row(self, name: str, index: int) -> np.ndarray:
    """Row `index` of the tensor."""
    return self._infos[name].row(index)


def open_folder(folder: Path) -> Checkpoint:
  """Finds the weights of a Hugging Face folder, safetensors before .bin.

  Raises:
    UserError: no weights, or a file of them is missing, truncated, corrupt or mixed up.
  """
  if (folder / SAFE_INDEX).exists() or (folder / SAFE).exists():
    return Checkpoint(folder, safetensors_io.read_folder(folder))
  if (folder / BIN_INDEX).exists():
    return Checkpoint(folder, safetensors_io.merge_shards(folder / BIN_INDEX, read_bin))
  if (folder / BIN).exists():
    return Checkpoint(folder, read_bin(folder / BIN))
  found = sorted(p.name for p in folder.iterdir() if p.suffix in ('.safetensors', '.bin', '.h5'))
  near = did_you_mean(found[0], (SAFE, SAFE_INDEX, BIN, BIN_INDEX)) if found else ''
  there = f'; it has {found[0]!r}, but no index that names it{near}' if found else ''
  raise UserError(f'{folder} has no {SAFE}, {BIN} or index of shards{there}')


def _strip_prefixes(infos: dict[str, Any]) -> dict[str, Any]:
  while infos:
    prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in infos)), None)
    if prefix is None:
      break
    infos = {name[len(prefix):]: info for name, info in infos.items()}
  return infos


class _Loaded:
  """A tensor of an old-format .bin file, which cannot be mapped: held until it is released."""

  def __init__(self, array: np.ndarray):
    self.shape, self.dtype = array.shape, array.dtype
    self._array = array

  def read(self) -> np.ndarray:
    return self._array

  def row(self, index: int) -> np.ndarray:
    return self._array[index]


def read_bin(file: Path) -> dict[str, Any]:
  """The tensors of one PyTorch file: unpickled without their bytes, which are then mapped.

  Only tensors and plain containers are unpickled (torch's weights_only); nothing is executed.

  Raises:
    UserError: torch is missing, the file is no checkpoint, or would execute code.
  """
  try:
    import torch
  except ImportError as error:
    raise UserError(
        f'{file} is a PyTorch file, which takes torch to read: install torch, or convert the file '
        'to safetensors'
    ) from error
  remedy = 'restore or download it again'
  try:
    with open(file, 'rb') as f:
      zipped = f.read(4) == _ZIP_MAGIC
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # what a broken file makes torch guess
      values = torch.load(file, map_location='meta' if zipped else 'cpu', weights_only=True)
  except OSError as error:
    raise UserError(f'cannot read {file}: {error}; {remedy}') from error
  except Exception as error:  # torch raises many kinds; what matters is whose fault it is
    text = str(error)
    blocked = re.search(r'GLOBAL (\S+)|class (\S+)', text) if 'nsupported' in text else None
    if blocked:
      name = blocked.group(1) or blocked.group(2)
      raise UserError(
          f'{file} holds more than tensors ({name}) and could execute code, so it was refused: use '
          'a safetensors file of the model'
      ) from error
    raise UserError(f'{file} is truncated or no PyTorch checkpoint; {remedy}') from error
  if isinstance(values, dict) and isinstance(values.get('state_dict'), dict):
    values = values['state_dict']
  if not isinstance(values, dict) or not all(torch.is_tensor(v) for v in values.values()):
    raise UserError(f'{file} holds no plain dict of tensors: save model.state_dict() and retry')
  make = _mapped if zipped else _held
  return {name: make(file, name, tensor) for name, tensor in values.items()}


def _numpy_dtype(file: Path, name: str, tensor: Any) -> np.dtype:
  kind = str(tensor.dtype).removeprefix('torch.')
  try:
    return np.dtype(getattr(ml_dtypes, kind, kind))
  except TypeError as error:
    raise UserError(f'{file}: tensor {name!r} has the unsupported type {tensor.dtype}') from error


def _mapped(file: Path, name: str, tensor: Any) -> TensorInfo:
  dtype = _numpy_dtype(file, name, tensor)
  offset = tensor.untyped_storage()._checkpoint_offset
  end = offset + tensor.untyped_storage().nbytes()
  if end > file.stat().st_size:
    raise UserError(f'{file} is truncated inside {name!r}; restore or download it again')
  return TensorInfo(
      name=name, shape=tuple(tensor.shape), dtype=dtype, file=file,
      offset=offset + tensor.storage_offset() * dtype.itemsize,
      strides=None if tensor.is_contiguous() else tuple(tensor.stride()),
  )


def _held(file: Path, name: str, tensor: Any) -> _Loaded:
  import torch
  dtype = _numpy_dtype(file, name, tensor)
  flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
  return _Loaded(flat.view(dtype).reshape(tuple(tensor.shape)))
