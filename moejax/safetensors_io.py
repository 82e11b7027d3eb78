"""Safetensors files: checked, memory-mapped reading and streaming, sharded writing.

The format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes in C order.
A tensor is mapped by itself and unmapped with the last array on it, so reading a model tensor by
tensor never holds more of it than the caller does. NumPy has no bfloat16 of its own: `ml_dtypes`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import json
import math
import mmap
from pathlib import Path
import re
from typing import IO, Any

import ml_dtypes
import numpy as np

from moejax import files
from moejax.errors import UserError

INDEX = 'model.safetensors.index.json'
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in (
        ('BOOL', np.bool_), ('U8', np.uint8), ('I8', np.int8), ('U16', np.uint16),
        ('I16', np.int16), ('U32', np.uint32), ('I32', np.int32), ('U64', np.uint64),
        ('I64', np.int64), ('F16', np.float16), ('BF16', ml_dtypes.bfloat16), ('F32', np.float32),
        ('F64', np.float64), ('F8_E4M3', ml_dtypes.float8_e4m3fn),
        ('F8_E5M2', ml_dtypes.float8_e5m2),
    )
}
_CODES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
  """Where one tensor lies: `offset` bytes into `file`, C order unless `strides` (in elements)."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  file: Path
  offset: int
  strides: tuple[int, ...] | None = None

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def read(self) -> np.ndarray:
    """The tensor as a read-only array over its own memory map."""
    if self.strides is None:
      return _map(self.file, self.offset, math.prod(self.shape), self.dtype).reshape(self.shape)
    last = sum((n - 1) * s for n, s in zip(self.shape, self.strides)) + 1
    flat = _map(self.file, self.offset, last if math.prod(self.shape) else 0, self.dtype)
    bytes_strides = [s * self.dtype.itemsize for s in self.strides]
    return np.lib.stride_tricks.as_strided(flat, self.shape, bytes_strides, writeable=False)

  def row(self, index: int) -> np.ndarray:
    """`read()[index]`, mapping nothing else of the tensor."""
    if self.strides is not None:
      return self.read()[index]
    size = math.prod(self.shape[1:])
    offset = self.offset + index * size * self.dtype.itemsize
    return _map(self.file, offset, size, self.dtype).reshape(self.shape[1:])


def _map(file: Path, offset: int, count: int, dtype: np.dtype) -> np.ndarray:
  if count == 0:
    return np.empty(0, dtype)
  start = offset - offset % mmap.ALLOCATIONGRANULARITY
  length = offset - start + count * dtype.itemsize
  try:
    with open(file, 'rb') as f:
      mapped = mmap.mmap(f.fileno(), length, access=mmap.ACCESS_READ, offset=start)
  except (OSError, ValueError) as error:
    raise UserError(f'cannot read {file}: {error}; restore or download it again') from error
  return np.frombuffer(mapped, dtype, count, offset - start)


def read_header(file: Path) -> dict[str, TensorInfo]:
  """The tensors of one safetensors file, every length and offset checked.

  Raises:
    UserError: the file is missing, truncated or corrupt.
  """
  remedy = 'restore or download it again'
  try:
    size = file.stat().st_size
    with open(file, 'rb') as f:
      start = f.read(8)
      length = int.from_bytes(start, 'little')
      if len(start) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise UserError(
            f'{file} is no complete safetensors file: {size} bytes end inside the header; {remedy}'
        )
      header = f.read(length)
  except OSError as error:
    raise UserError(f'cannot read {file}: {error.strerror}; {remedy}') from error
  try:
    entries = json.loads(header)
    entries.pop('__metadata__', None)
    infos = {
        name: TensorInfo(
            name=name, shape=tuple(int(n) for n in entry['shape']), dtype=DTYPES[entry['dtype']],
            file=file, offset=8 + length + entry['data_offsets'][0],
        )
        for name, entry in entries.items()
    }
    ends = {name: 8 + length + entry['data_offsets'][1] for name, entry in entries.items()}
  except (
      ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError
  ) as error:
    raise UserError(f'{file} has a corrupt safetensors header ({error!r}); {remedy}') from error
  position = 8 + length
  for info in sorted(infos.values(), key=lambda i: (i.offset, ends[i.name])):
    end = ends[info.name]
    if info.offset != position or end - info.offset != info.nbytes:
      raise UserError(
          f'{file}: tensor {info.name!r} of shape {info.shape} needs bytes {position} to '
          f'{position + info.nbytes}, its header says {info.offset} to {end}; {remedy}'
      )
    position = end
  if position != size:
    raise UserError(
        f'{file} is truncated or padded: {position} bytes expected, {size} found; {remedy}'
    )
  return infos


def read_folder(folder: Path) -> dict[str, TensorInfo]:
  """The tensors of a folder: its index and shards, or its single model.safetensors.

  Raises:
    UserError: a shard is missing, holds a tensor the index does not give it, or lacks one.
  """
  index = folder / INDEX
  if not index.exists():
    return read_header(folder / 'model.safetensors')
  return merge_shards(index, read_header)


def merge_shards(
    index: Path, read: Callable[[Path], dict[str, TensorInfo]]
) -> dict[str, TensorInfo]:
  """Reads every shard that an index file names, and checks that the two agree."""
  weight_map = files.read_json(index).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise UserError(f'{index} has no weight_map: restore or download it again')
  shards: dict[str, dict[str, TensorInfo]] = {}
  for shard in sorted({str(s) for s in weight_map.values()}):
    if Path(shard).name != shard:
      raise UserError(f'{index} names {shard!r}: a shard must lie beside its index')
    if not (index.parent / shard).exists():
      raise UserError(f'{index} names {shard!r}, which is missing: restore or download it again')
    shards[shard] = read(index.parent / shard)
  infos = {}
  for name, shard in weight_map.items():
    if name not in shards[shard]:
      other = next((s for s, found in shards.items() if name in found), None)
      where = f'it is in {other}' if other else 'no shard has it'
      raise UserError(
          f'{index} says that {name!r} is in {shard}, but {where}: the shards are mixed up; '
          'restore the index and its shards together'
      )
    infos[name] = shards[shard][name]
  for shard, found in shards.items():
    extra = sorted(set(found) - set(weight_map))
    if extra:
      raise UserError(
          f'{shard} holds {extra[0]!r}, which {index} does not list: the shards are mixed up; '
          'restore the index and its shards together'
      )
  return infos


@dataclasses.dataclass(frozen=True)
class Chunked:
  """An array that is made piece by piece: `chunks()` yields consecutive parts of its C order."""

  shape: tuple[int, ...]
  dtype: np.dtype
  chunks: Callable[[], Iterable[np.ndarray]]

  def assemble(self) -> np.ndarray:
    """The whole array; besides it, only one chunk is alive at a time."""
    whole = np.empty(self.shape, self.dtype)
    flat, position = whole.reshape(-1), 0
    for chunk in self.chunks():
      flat[position : position + chunk.size].reshape(chunk.shape)[...] = chunk
      position += chunk.size
    return whole


def whole(array: Any) -> Chunked:
  """An array in one chunk."""
  return Chunked(tuple(array.shape), np.dtype(array.dtype), lambda: (np.asarray(array),))


def check_finite(array: np.ndarray, name: str, where: Path | str) -> None:
  """Raises UserError if a floating array holds NaN or infinity; memory: one block."""
  dtype = array.dtype
  if dtype.itemsize == 2 and dtype in (np.float16, ml_dtypes.bfloat16):
    exponent = np.uint16(0x7C00 if dtype == np.float16 else 0x7F80)
    bad = lambda block: ((block.view(np.uint16) & exponent) == exponent).any()
  elif dtype in (np.float32, np.float64):
    # A finite sum proves finite parts; the exact look is for sums that overflow.
    bad = lambda block: not np.isfinite(block.sum()) and not np.isfinite(block).all()
  else:
    return
  with np.errstate(over='ignore', invalid='ignore'):
    flat = np.ascontiguousarray(array).reshape(-1)
    for start in range(0, flat.size, _BLOCK):
      if bad(flat[start : start + _BLOCK]):
        raise UserError(
            f'{where}: tensor {name!r} holds NaN or infinite values: '
            'restore the file, or go back to an earlier checkpoint'
        )


class Writer:
  """Writes tensors one after another into shards `model-0000i-of-0000n.safetensors` and an index.

  Room for a shard's header is kept free at its start and filled last, so neither the tensors nor
  their number need be known beforehand. With `expected` (names, or an estimate of them) the room
  is cut to size. Run it inside `files.atomic_folder`.
  """

  def __init__(
      self, folder: Path, *, expected: Sequence[str] | None = None, shard_bytes: int = 4 << 30
  ):
    self._folder = folder
    self._shard_bytes = shard_bytes
    self._room = 1 << 16
    if expected is not None:
      self._room = 256 + sum(_entry_room(name, (1 << 15,) * 3) for name in expected)
    self._shards: list[Path] = []
    self._weight_map: dict[str, int] = {}
    self._file: IO[bytes] | None = None
    self._header: dict[str, Any] = {}
    self._header_size = 0
    self._start = self._position = 0
    self._total = 0

  def add(self, name: str, leaf: Any) -> None:
    """Appends one tensor: an array or a Chunked."""
    chunked = leaf if isinstance(leaf, Chunked) else whole(leaf)
    nbytes = math.prod(chunked.shape) * chunked.dtype.itemsize
    if name in self._weight_map:
      raise ValueError(f'tensor {name!r} is written twice')
    room = _entry_room(name, chunked.shape)
    if self._file is not None and self._header and (
        self._position + nbytes > self._shard_bytes
        or self._header_size + room > self._room - 256
    ):
      self._finish_shard()
    if self._file is None:
      self._start_shard(room)
    assert self._file is not None
    written = 0
    for chunk in chunked.chunks():
      chunk = np.ascontiguousarray(chunk, chunked.dtype)
      self._file.write(chunk.reshape(-1).view(np.uint8).data)
      written += chunk.nbytes
    if written != nbytes:
      raise ValueError(f'tensor {name!r}: {written} bytes came, its shape needs {nbytes}')
    self._header[name] = {
        'dtype': _CODES[chunked.dtype], 'shape': list(chunked.shape),
        'data_offsets': [self._position, self._position + nbytes],
    }
    self._header_size += room
    self._position += nbytes
    self._total += nbytes
    self._weight_map[name] = len(self._shards) - 1

  def close(self) -> dict[str, str]:
    """Finishes the last shard, names all, writes the index; returns tensor -> file name.

    One shard is named model.safetensors and has no index, as Hugging Face does it.
    """
    if self._file is None and not self._shards:
      self._start_shard(0)
    if self._file is not None:
      self._finish_shard()
    n = len(self._shards)
    names = [f'model-{i + 1:05d}-of-{n:05d}.safetensors' for i in range(n)]
    if n == 1:
      names = ['model.safetensors']
    for shard, name in zip(self._shards, names):
      shard.rename(self._folder / name)
    weight_map = {name: names[i] for name, i in self._weight_map.items()}
    if n > 1:
      metadata = {'total_size': self._total}
      files.write_json(self._folder / INDEX, {'metadata': metadata, 'weight_map': weight_map})
    return weight_map

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, kind, *_) -> None:
    if kind is None:
      return
    if self._file is not None:
      # Closing flushes, which may fail again on a full disk; the first error is the one to tell.
      with contextlib.suppress(OSError):
        self._file.close()

  def _start_shard(self, room: int) -> None:
    shard = self._folder / f'shard-{len(self._shards):05d}.tmp'
    self._file = open(shard, 'wb')  # noqa: SIM115
    self._shards.append(shard)
    self._start = -(-max(self._room, room + 256) // 64) * 64
    self._file.write(bytes(self._start))
    self._header, self._header_size, self._position = {}, 0, 0

  def _finish_shard(self) -> None:
    assert self._file is not None
    header = json.dumps({'__metadata__': {'format': 'pt'}, **self._header}, separators=(',', ':'))
    encoded = header.encode().ljust(self._start - 8)
    if len(encoded) != self._start - 8:
      raise ValueError('the room kept for the safetensors header was too small')
    self._file.seek(0)
    self._file.write(len(encoded).to_bytes(8, 'little') + encoded)
    self._file.close()
    self._file = None


def _entry_room(name: str, shape: tuple[int, ...]) -> int:
  """An upper bound on the header bytes of one tensor in a shard below 100 TB."""
  return len(json.dumps(name)) + len(json.dumps(shape)) + 90


def tensor_sort_key(name: str) -> tuple:
  """Orders names with their numbers by value: layers_2 before layers_10."""
  return tuple(int(p) if p.isdigit() else p for p in re.split(r'(\d+)', name))


def write_folder(folder: Path, tensors: Iterator[tuple[str, Any]], **kwargs) -> dict[str, str]:
  """Streams (name, array or Chunked) pairs into a folder; returns tensor -> file name."""
  with Writer(folder, **kwargs) as writer:
    for name, leaf in tensors:
      writer.add(name, leaf)
    return writer.close()
