"""Quantizes a batch of expert matrices and stores them: search, GPTQ, refit, quality gate."""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moejax.compress import (
  gptq_core,
  grids_core,
  groups_core,
  hessian_core,
  parts,
  refit_core,
  search_core,
)
from moejax.errors import UserError, did_you_mean

_LADDER: tuple[str | int, ...] = ('ternary', 2, 3, 4)  # Of a matrix that loses too much.
_CHOICES = {
    'method': ('gptq', 'rtn'), 'storage': ('moejax', 'qmoe_v1', 'dense'),
    'level_dtype': ('bfloat16', 'float32', 'weights'),
}
_CHUNK = 2048
KEPT = 'bfloat16'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
  """Search for the grid of each matrix, see `search_core`: the least error, or the least sum of
  errors at target_bits a weight over a group of experts, all metadata counted (`budget`)."""

  target_bits: float | None = None
  scales: tuple[float, ...] = search_core.SCALES
  thresholds: tuple[float, ...] = search_core.THRESHOLDS
  outputs: int = 64

  def __post_init__(self):
    if self.target_bits is not None and not self.target_bits > 0:
      raise UserError(f'search.target_bits = {self.target_bits}: above 0')
    for name in ('scales', 'thresholds'):
      values = getattr(self, name)
      if not values or not all(0 < v <= (4 if name == 'scales' else 1) for v in values):
        raise UserError(f'search.{name} = {values}: at least one number, each above 0')
    if self.outputs < 1:
      raise UserError(f'search.outputs = {self.outputs}: at least 1')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How one matrix is quantized; the fields are explained at `quantize.quantize`."""

  bits: Any = 'ternary'
  method: str = 'gptq'
  damping: float = 0.1
  block_size: int = 128
  act_order: bool = False
  group_size: int | None = None
  symmetric: bool = False
  refit: bool = True
  refit_ridge: float = 0.1
  gain_weight: float = 10.0
  grid_scale: float = 1.0
  threshold: float = 0.5
  search: Search | None = None
  storage: str = 'moejax'
  level_dtype: str = 'bfloat16'
  max_error: float | None = None

  def __post_init__(self):
    if self.bits not in grids_core.BITS:
      raise UserError(f'bits = {self.bits!r}: one of {grids_core.BITS}')
    for name, known in _CHOICES.items():
      value = str(getattr(self, name))
      if value not in known:
        raise UserError(f'{name} = {value!r}: one of {known}{did_you_mean(value, known)}')
    if self.group_size is not None and self.group_size < 1:
      raise UserError(f'group_size = {self.group_size}: at least 1, or None')
    if self.group_size is not None and self.bits == 'ternary' and self.storage != 'dense':
      raise UserError(
          f'group_size = {self.group_size} with ternary bits: the ternary formats hold one pair of '
          'levels an output; use 2, 3, 4 or 8 bits, or storage dense'
      )
    if self.group_size is not None and self.act_order and self.storage != 'dense':
      raise UserError(
          'group_size with act_order: groups of reordered inputs fit no storage; drop one of them'
      )
    if self.group_size is not None and (self.search is not None or self.max_error is not None):
      raise UserError('group_size with search or max_error is not supported; drop one of them')
    if self.storage == 'qmoe_v1' and self.bits != 'ternary':
      raise UserError(f"storage = 'qmoe_v1' holds ternary weights only, not bits = {self.bits}")
    if not 0 <= self.damping < math.inf or self.block_size < 1 or not 0 < self.grid_scale <= 4:
      raise UserError(
          f'damping = {self.damping}: at least 0; block_size = {self.block_size}: at least 1; '
          f'grid_scale = {self.grid_scale}: in (0, 4]'
      )
    if self.max_error is not None and not self.max_error >= 0:
      raise UserError(f'max_error = {self.max_error}: at least 0, or None')
    if not (0 <= self.refit_ridge < math.inf and 0 <= self.gain_weight < math.inf):
      raise UserError(
          f'refit_ridge = {self.refit_ridge} and gain_weight = {self.gain_weight}: at least 0'
      )
    if not 0 < self.threshold < 1:
      raise UserError(f'threshold = {self.threshold}: between 0 and 1')

  @property
  def budget(self) -> float | None:
    """Bits a weight that a search has to keep; only ternary weights can trade them."""
    return self.search.target_bits if self.search is not None and self.bits == 'ternary' else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
  """The parts of e matrices, and a report row for each."""

  parts: tuple[parts.Part, ...]
  rows: tuple[dict[str, Any], ...]


def chunks(x_md: np.ndarray, size: int = _CHUNK) -> Iterator[jax.Array]:
  """Rows in pieces of few static sizes, the last padded with rows of 0."""
  for start in range(0, len(x_md), size):
    piece = x_md[start : start + size]
    rows = min(size, max(16, 1 << (len(piece) - 1).bit_length()))
    yield jnp.asarray(np.pad(piece, ((0, rows - len(piece)), (0, 0))))


def hessians(inputs: Iterable[np.ndarray]) -> tuple[jax.Array, list[int]]:
  """The Hessian of each expert's inputs [m, d], float32 [e, d, d], and how many they were.

  Identity without tokens.
  """
  grams, tokens = [], []
  for x in inputs:
    gram = jnp.zeros((x.shape[1], x.shape[1]), jnp.float32)
    for chunk in chunks(x):
      gram = gram + hessian_core.gram(chunk)
    grams.append(gram)
    tokens.append(len(x))
  return hessian_core.scale_gram(jnp.stack(grams), np.array(tokens)), tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Attempt:
  """e matrices at one bit width, on the host."""

  bits: str | int
  symbols: np.ndarray  # [e, f, d]
  levels: np.ndarray  # [e, f, 2], or [e, f, groups, 2]
  values: np.ndarray | None  # [e, d, f] where symbols alone do not tell
  before: np.ndarray  # [e]
  after: np.ndarray
  fallback: np.ndarray
  grid_scale: np.ndarray
  threshold: np.ndarray


def level_dtype(w: Any, settings: Settings) -> Any:
  """The dtype the levels of `w` are stored in."""
  return w.dtype if settings.level_dtype == 'weights' else np.dtype(settings.level_dtype)


def try_grids(w_edf: Any, h_edd: jax.Array, bits: str | int, settings: Settings) -> Any:
  """`search_core.try_grids` for settings with a search."""
  s = settings.search
  assert s is not None
  return search_core.try_grids(
      jnp.asarray(w_edf), h_edd, bits=bits, scales=s.scales, thresholds=s.thresholds,
      outputs=s.outputs, damping=settings.damping, block_size=settings.block_size,
      symmetric=settings.symmetric, act_order=settings.act_order, refit=settings.refit,
      ridge=settings.refit_ridge, gain_weight=settings.gain_weight,
      level_dtype=level_dtype(w_edf, settings), rounding=settings.method == 'rtn',
  )


def _attempt(w, h, bits, settings: Settings, dtype, grids) -> _Attempt:
  e = w.shape[0]
  scale = np.full(e, settings.grid_scale, np.float32)
  threshold = np.full(e, settings.threshold, np.float32)
  if grids is not None:
    scale, threshold = grids
  elif settings.search is not None:
    tried = try_grids(w, h, bits, settings)
    best = tried.error.argmin(0)
    scale, threshold = tried.grid_scale[best], tried.threshold[best]
  options: dict[str, Any] = {
      'symmetric': settings.symmetric, 'grid_scale': jnp.asarray(scale),
      'threshold': jnp.asarray(threshold),
  }
  sweep: dict[str, Any] = {
      'damping': settings.damping, 'block_size': settings.block_size,
      'act_order': settings.act_order, **options,
  }
  if settings.group_size is not None:
    if settings.method == 'rtn':
      q = groups_core.rtn_grouped(w, bits, settings.group_size, **options)
    else:
      q = groups_core.gptq_grouped(w, h, bits, settings.group_size, **sweep)
    levels = jnp.stack([jnp.swapaxes(a, 1, 2) for a in grids_core.row_levels(q.grid)], -1)
    error = hessian_core.quadratic(h, w.astype(jnp.float32) - q.values).sum(1)
    before = after = np.asarray(error)
    values = np.asarray(q.values) if settings.act_order else None
  else:
    if settings.method == 'rtn':
      q = gptq_core.rtn(w, bits, **options)
    else:
      q = gptq_core.gptq(w, h, bits, **sweep)
    fit = refit_core.refit(
        w, h, q, ridge=settings.refit_ridge, gain_weight=settings.gain_weight, level_dtype=dtype,
        enabled=settings.refit,
    )
    levels, values = fit.levels, None
    before, after = np.asarray(fit.error_before.sum(1)), np.asarray(fit.error_after.sum(1))
  symbols = np.ascontiguousarray(np.swapaxes(np.asarray(q.symbols), 1, 2)).view(np.uint8)
  return _Attempt(
      bits=bits, symbols=symbols, levels=np.asarray(levels), values=values, before=before,
      after=after, fallback=np.asarray(q.fallback), grid_scale=scale, threshold=threshold,
  )


def _store(attempt: _Attempt, take: np.ndarray, ids, settings: Settings, dtype) -> parts.Part:
  if attempt.values is not None:
    weight: Any = attempt.values[take].astype(dtype)
  else:
    storage = settings.storage
    if storage == 'qmoe_v1' and attempt.bits != 'ternary':
      storage = 'moejax'
    weight = parts.make_weight(
        attempt.symbols[take], attempt.levels[take], attempt.bits, storage, dtype,
        settings.group_size,
    )
  experts = tuple(int(ids[i]) for i in take)
  return parts.Part(format=str(attempt.bits), experts=experts, weight=weight)


def _bits(weight: Any) -> float:
  if hasattr(weight, 'bits_per_weight'):
    return weight.bits_per_weight()
  return 8.0 * weight.dtype.itemsize


def _fallback(tokens: int, failed: bool, settings: Settings) -> str:
  if settings.method == 'rtn':
    return ''
  if tokens == 0:
    return 'no tokens: rounded'
  return 'hessian not positive definite: rounded' if failed else ''


def quantize_matrices(
    w_edf: np.ndarray, h_edd: jax.Array, tokens: Sequence[int], settings: Settings, path: str,
    ids: Sequence[int], grids: tuple[np.ndarray, np.ndarray] | None = None,
) -> Stored:
  """Quantizes the matrices `ids` of the weight at `path`, climbing bits where the error is over
  settings.max_error: the settings' bits, then 2, 3, 4, then bf16 as it was.

  A row's errors are None where they overflow; such a matrix is over every bound.

  Args:
    w_edf: [e, d, f] in the weights' dtype. h_edd: undamped Hessians. tokens: [e], calibration
      tokens of each. settings, path, ids: see above.
    grids: range and threshold of each matrix at the settings' bits, [e], chosen already; None
      searches for the least error if the settings have a search.
  """
  for i, one in enumerate(w_edf):
    if not np.isfinite(one.astype(np.float32)).all():
      raise UserError(f'{path}, expert {ids[i]}: NaN or infinite weights; restore the model')
  dtype = level_dtype(w_edf, settings)
  w = jnp.asarray(w_edf)
  total = np.maximum(np.asarray(hessian_core.quadratic(h_edd, w).sum(1)), 1e-30)
  e = w.shape[0]
  pending = np.arange(e)
  rungs: tuple[str | int, ...] = (settings.bits,)
  if settings.max_error is not None and settings.bits in _LADDER:
    rungs = _LADDER[_LADDER.index(settings.bits) :]
  out: list[parts.Part] = []
  rows: dict[int, dict[str, Any]] = {}
  tried: dict[int, list[Any]] = {i: [] for i in range(e)}
  for bits in rungs:
    given = grids if bits == settings.bits else None
    a = _attempt(w[pending], h_edd[pending], bits, settings, dtype, given)
    error = a.after / total[pending]
    good = np.ones(len(pending), bool) if settings.max_error is None else (
        error <= settings.max_error
    )
    kept = np.flatnonzero(good)
    for i in np.flatnonzero(~good).tolist():
      tried[int(pending[i])].append({'bits': bits, 'relative_output_error': _known(error[i])})
    if kept.size:
      part = _store(a, kept, [ids[int(j)] for j in pending], settings, dtype)
      out.append(part)
      for i in kept.tolist():
        j = int(pending[i])
        rows[j] = {
            'bits': bits, 'bits_per_weight': _bits(part.weight),
            'zeros': _zeros(a, i, settings.group_size), 'relative_output_error': _known(error[i]),
            'error_before_refit': _known(a.before[i] / total[j]),
            'fallback': _fallback(tokens[j], bool(a.fallback[i]), settings),
            'grid_scale': float(a.grid_scale[i]), 'threshold': float(a.threshold[i]),
        }
    pending = pending[~good]
    if not pending.size:
      break
  if pending.size:
    kept_weight = w_edf[pending].astype(ml_dtypes.bfloat16)
    experts = tuple(int(ids[int(j)]) for j in pending)
    out.append(parts.Part(format=KEPT, experts=experts, weight=kept_weight))
    for j in pending:
      zeros = float((w_edf[j] == 0).mean())
      rows[int(j)] = {
          'bits': KEPT, 'bits_per_weight': 16.0, 'zeros': zeros, 'relative_output_error': 0.0,
          'error_before_refit': 0.0, 'fallback': '', 'grid_scale': 1.0, 'threshold': 0.5,
      }
  table = tuple(
      {'path': path, 'expert': int(ids[j]), 'tokens': int(tokens[j]), 'over_bound': tried[j],
       **rows[j]}
      for j in range(e)
  )
  return Stored(parts=tuple(out), rows=table)


def _known(error: Any) -> float | None:
  """None where the inputs or weights are too large for float32 to tell."""
  return float(error) if np.isfinite(error) else None


def _zeros(a: _Attempt, i: int, group_size: int | None) -> float:
  if a.values is not None:
    return float((a.values[i] == 0).mean())
  values = parts.dequantize(
      a.symbols[i : i + 1], a.levels[i : i + 1], a.bits,
      None if a.levels.ndim == 3 else group_size,
  )
  return float((values == 0).mean())
