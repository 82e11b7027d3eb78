"""Compressed experts on their way to the model: a group's parts, on disk and joined to nodes."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import itertools
import os
from pathlib import Path
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax import files, safetensors_io, weights
from moejax.errors import UserError

_GROUP_JSON = 'group.json'
_ARRAY = 'array'
_BESIDE = 'beside'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """Some experts of one weight in one format; weight is a node or an array [e, d, f]."""

  format: str
  experts: tuple[int, ...]
  weight: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  """The parts of a group of experts by weight name ('wi', ...), and rows of the report.

  experts: by their numbers in the model to come. leaves: what changes in the FFN beside its
  experts, by path ('router/kernel').
  """

  experts: tuple[int, ...]
  parts: Mapping[str, Sequence[Part]]
  rows: Sequence[Mapping[str, Any]]
  leaves: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def make_weight(
    symbols_erc: np.ndarray, levels_er2: np.ndarray, bits: str | int, storage: str,
    level_dtype: Any, group_size: int | None = None,
) -> Any:
  """A node (or, for storage 'dense', an array [e, d, f]) from symbols and levels on the host.

  Args:
    symbols_erc: integers [e, f, d], an output's inputs in a row.
    levels_er2: float32 [e, f, 2], or [e, f, groups, 2]: (low, high) or (scale, zero).
    storage: 'moejax', 'qmoe_v1' or 'dense'.
  """
  if storage == 'dense':
    return np.swapaxes(dequantize(symbols_erc, levels_er2, bits, group_size), 1, 2).astype(
        level_dtype
    )
  if bits == 'ternary':
    node = weights.TernaryV1 if storage == 'qmoe_v1' else weights.Ternary
    return node.from_symbols(symbols_erc, levels_er2, level_dtype=level_dtype)
  return weights.Packed.from_symbols(
      symbols_erc, levels_er2[..., 0], levels_er2[..., 1], bits=int(bits),
      group_size=group_size or 0, level_dtype=level_dtype,
  )


def dequantize(
    symbols_erc: np.ndarray, levels: np.ndarray, bits: str | int, group_size: int | None = None
) -> np.ndarray:
  """Float32 values [e, rows, cols] of symbols and levels (as in `make_weight`)."""
  first, second = (np.asarray(levels[..., i], np.float32) for i in (0, 1))
  if group_size:
    cols = symbols_erc.shape[2]
    first, second = (np.repeat(a, group_size, axis=2)[..., :cols] for a in (first, second))
  else:
    first, second = first[..., None], second[..., None]
  if bits == 'ternary':
    return np.where(symbols_erc == 2, second, np.where(symbols_erc == 1, first, np.float32(0)))
  return first * (symbols_erc.astype(np.float32) - second)


def dense(weight: Any) -> np.ndarray:
  """Float32 [e, d, f] of a node or an array, decoded on the host."""
  if not isinstance(weight, weights.WeightNode):
    return np.asarray(weight, np.float32)
  if isinstance(weight, weights.Packed):
    levels = np.stack([np.asarray(weight.scale), np.asarray(weight.zero)], -1)
    rows = dequantize(
        weight.symbols(), levels.astype(np.float32), weight.width, weight.group_size or weight.cols
    )
  elif isinstance(weight, weights.BlockTernary):
    return dense(weight.two_bit())
  elif isinstance(weight, weights.Ternary | weights.TernaryV1 | weights.PackedTernary):
    two = isinstance(weight, weights.PackedTernary)
    levels = np.asarray(weight.row_levels() if two else weight.levels, np.float32)
    rows = dequantize(weight.symbols(), levels, 'ternary')
  else:
    return np.asarray(weight.dense(jnp.float32))
  return np.swapaxes(rows, 1, 2)


def group_dense(group: Group, name: str) -> np.ndarray:
  """Float32 [e, d, f] of one weight of a group, experts in the group's order."""
  place = {expert: i for i, expert in enumerate(group.experts)}
  out: Any = None
  for part in group.parts[name]:
    values = dense(part.weight)
    if out is None:
      out = np.empty((len(group.experts), *values.shape[1:]), np.float32)
    out[[place[e] for e in part.experts]] = values
  return out


def save_group(folder: Path, group: Group) -> None:
  """Writes a group under `folder`, whole or not at all."""
  partial = folder.with_name(folder.name + '.partial')
  try:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    entries: list[dict[str, Any]] = []
    tensors: list[tuple[str, np.ndarray]] = []
    for name, parts in group.parts.items():
      for part in parts:
        is_node = isinstance(part.weight, weights.WeightNode)
        arrays = part.weight.to_arrays() if is_node else {_ARRAY: np.asarray(part.weight)}
        entries.append({
            'name': name, 'format': part.format, 'experts': list(part.experts),
            'class': type(part.weight).__name__ if is_node else _ARRAY,
            'static': part.weight.static() if is_node else {}, 'fields': sorted(arrays),
        })
        tensors.extend((f'{name}/{part.format}/{k}', arrays[k]) for k in sorted(arrays))
    tensors.extend((f'{_BESIDE}/{path}', np.asarray(leaf)) for path, leaf in group.leaves.items())
    safetensors_io.write_folder(partial, iter(tensors), expected=[name for name, _ in tensors])
    files.write_json(partial / _GROUP_JSON, {
        'experts': list(group.experts), 'parts': entries, 'rows': [dict(r) for r in group.rows],
        'leaves': list(group.leaves),
    })
    for file in partial.iterdir():
      with open(file, 'rb') as f:
        os.fsync(f.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
  except (OSError, files.WriteError) as error:
    shutil.rmtree(partial, ignore_errors=True)
    left = 'finished groups are kept: run again to go on from them'
    raise files.os_error(folder, error, left=left) from error


def load_group(folder: Path) -> Group | None:
  """The group that `save_group` wrote there, or None."""
  if not (folder / _GROUP_JSON).is_file():
    return None
  entries = files.read_json(folder / _GROUP_JSON)
  infos = safetensors_io.read_folder(folder)
  parts: dict[str, list[Part]] = {}
  for entry in entries['parts']:
    prefix = f'{entry["name"]}/{entry["format"]}'
    arrays = {field: np.array(infos[f'{prefix}/{field}'].read()) for field in entry['fields']}
    if entry['class'] == _ARRAY:
      weight: Any = arrays[_ARRAY]
    else:
      weight = weights.NODE_CLASSES[entry['class']].from_arrays(entry['static'], arrays)
    part = Part(format=entry['format'], experts=tuple(entry['experts']), weight=weight)
    parts.setdefault(entry['name'], []).append(part)
  leaves = {path: np.array(infos[f'{_BESIDE}/{path}'].read()) for path in entries['leaves']}
  return Group(
      experts=tuple(entries['experts']), parts=parts, rows=entries['rows'], leaves=leaves
  )


def join(parts: Iterable[Part]) -> Any:
  """One weight [e, d, f] of all experts: an array, a node, or a Mixed of several formats."""
  by_format: dict[str, list[Part]] = {}
  for part in parts:
    by_format.setdefault(part.format, []).append(part)
  joined, experts = [], []
  for same in by_format.values():
    joined.append(_concat([p.weight for p in same]))
    experts.append([e for p in same for e in p.experts])
  if len(joined) == 1 and experts[0] == sorted(experts[0]):
    return joined[0]
  return weights.Mixed.from_parts(joined, experts)


def _concat(pieces: Sequence[Any]) -> Any:
  """Nodes of one class and shape [., d, f] as one node of all their experts."""
  first = pieces[0]
  if len(pieces) == 1:
    return first
  stack = lambda field: np.concatenate([np.asarray(getattr(p, field)) for p in pieces])
  if not isinstance(first, weights.WeightNode):
    return np.concatenate(pieces)
  if isinstance(first, weights.Ternary):
    words, offsets = _shift([np.asarray(p.words)[0] for p in pieces], [p.offsets for p in pieces])
    return dataclasses.replace(
        first, words=words[None], offsets=offsets, design=stack('design'), levels=stack('levels'),
        max_words=max(p.max_words for p in pieces),
        designs=tuple(sorted({d for p in pieces for d in p.designs})),
    )
  if isinstance(first, weights.TernaryV1):
    words, offsets = _shift([p.words for p in pieces], [p.row_offsets for p in pieces])
    return dataclasses.replace(
        first, words=words, row_offsets=offsets, levels=stack('levels'),
        max_words=max(p.max_words for p in pieces),
    )
  if isinstance(first, weights.LowRankSparse):
    kept = [p.kept for p in pieces]
    if not isinstance(kept[0], weights.WeightNode):
      return weights.LowRankSparse.concat(pieces)
    return dataclasses.replace(
        first, left=stack('left'), right=stack('right'), index=stack('index'), kept=_concat(kept)
    )
  if isinstance(first, weights.Packed):
    fields: dict[str, Any] = {name: stack(name) for name in ('words', 'scale', 'zero')}
    return dataclasses.replace(first, **fields)
  raise UserError(f'cannot join {len(pieces)} weights of class {type(first).__name__}')


def _shift(words: Sequence[Any], offsets: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
  sizes = [np.asarray(w).size for w in words]
  starts = [0, *itertools.accumulate(sizes)]
  if starts[-1] >= 2**31:
    raise UserError(f'{starts[-1]} codewords in one weight; 32-bit offsets hold 2^31')
  moved = [np.asarray(o) + np.uint32(s) for o, s in zip(offsets, starts)]
  return np.concatenate(words), np.concatenate(moved).astype(np.uint32)
