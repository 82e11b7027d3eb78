"""What a report holds, as frozen dataclasses, to and from the report.json contract.

report.json of one compression has source, steps, before, after and layers. A run that compares
several adds `variants`, each with its own steps, after, layers and evaluation; the top level then
repeats the headline variant's.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

from moejax.errors import UserError

SIZE_FIELDS = (
    'stored_bytes', 'expert_bytes', 'parameters', 'active_parameters_per_token',
    'flops_per_token', 'loss',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRow:
  """One expert weight, its experts taken together: means over those that were measured."""

  path: str
  bits_per_weight: float
  zeros: float
  relative_output_error: float
  fallbacks: int = 0
  experts: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fate:
  """What became of a layer's experts.

  groups: those that are left, each the experts it was made of, the dominant one first. notes: of
  each group, a line on why. dropped: those that are in none. method: by what they were chosen. A
  chain may change a layer several times.
  """

  path: str
  method: str
  groups: tuple[tuple[int, ...], ...]
  notes: tuple[str, ...]
  dropped: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
  """One row of the table: a model as stored, and how it did.

  sizes: the contract's 'after' object. loss: nats a masked word (else of all targets). routing:
  layer path -> share of the tokens of each expert. seconds: what making it took.
  """

  key: str
  name: str
  note: str = ''
  sizes: Mapping[str, Any]
  loss: float | None = None
  accuracy: float | None = None
  agreement: float | None = None
  kl: float | None = None
  seconds: float | None = None
  layers: tuple[LayerRow, ...] = ()
  routing: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)

  @property
  def stored_bytes(self) -> int:
    return int(self.sizes['stored_bytes'])

  @property
  def bits(self) -> float | None:
    """Stored bits an expert weight, all metadata counted."""
    return self.sizes.get('expert_bits_per_weight')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """A run ready to be drawn: the uncompressed model first, then what was made of it.

  model: its family, whether it is a decoder, its experts a layer and choices a token, where known.
  neurons_run: of the layers that were split into experts, the share of the neurons a token runs.
  """

  title: str
  source: str
  variants: tuple[Variant, ...]
  headline: Variant
  baselines: Mapping[str, float]
  facts: Mapping[str, Any]
  training: Mapping[str, Any]
  model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  fates: tuple[Fate, ...] = ()
  neurons_run: Mapping[str, float] = dataclasses.field(default_factory=dict)
  samples: tuple[Mapping[str, Any], ...] = ()

  @property
  def before(self) -> Variant:
    return self.variants[0]

  @property
  def target(self) -> str:
    """What the loss is a mean over."""
    return 'next word' if self.model.get('decoder') else 'hidden word'

  @property
  def compressed(self) -> tuple[Variant, ...]:
    return self.variants[1:]


def merge_layers(rows: Sequence[Mapping[str, Any]]) -> tuple[LayerRow, ...]:
  """Rows of the contract's 'layers', a matrix or an expert's matrix each, to one a weight path."""
  groups: dict[str, list[Mapping[str, Any]]] = {}
  for row in rows:
    if 'path' not in row:
      raise UserError(f'report: a row of layers has no path: {dict(row)!r}')
    groups.setdefault(row['path'], []).append(row)

  def mean(members, field):
    values = [float(m[field]) for m in members if m.get(field) is not None]
    return math.fsum(values) / len(values) if values else 0.0

  return tuple(
      LayerRow(
          path=path, bits_per_weight=mean(members, 'bits_per_weight'),
          zeros=mean(members, 'zeros'),
          relative_output_error=mean(members, 'relative_output_error'),
          fallbacks=sum(bool(m.get('fallback')) for m in members), experts=len(members),
      )
      for path, members in groups.items()
  )


def fates(rows: Sequence[Mapping[str, Any]]) -> tuple[Fate, ...]:
  """Of every layer whose rows tell who was merged or kept, in the order of the rows."""
  found: list[tuple[str, list[Mapping[str, Any]]]] = []
  for row in rows:
    path = row.get('path', '')
    if 'members' in row:
      # Rows of one merge stand together, its groups in order.
      if row.get('expert', 0) and found and found[-1][0] == path:
        found[-1][1].append(row)
      else:
        found.append((path, [row]))
    elif 'kept' in row and 'dropped' in row:
      found.append((path, [row]))
  return tuple(
      _merged(path, own) if 'members' in own[0] else _kept(path, own[0]) for path, own in found
  )


def _merged(path: str, rows: Sequence[Mapping[str, Any]]) -> Fate:
  groups, notes = [], []
  for row in rows:
    leader = row.get('dominant')
    groups.append(tuple(sorted(row['members'], key=lambda e: (e != leader, e))))
    error = row.get('relative_output_error')
    notes.append(', '.join([
        *([f'{row["usage"]:.1%} of the choices'] if row.get('usage') is not None else []),
        *([f'output off by {error:.0%}'] if error is not None else []),
    ]))
  return Fate(
      path=path, method='', groups=tuple(groups), notes=tuple(notes),
  )


def _kept(path: str, row: Mapping[str, Any]) -> Fate:
  scores = row.get('scores') or ()
  return Fate(
      path=path, method=str(row.get('method', '')),
      groups=tuple((e,) for e in row['kept']),
      notes=tuple(f'score {scores[e]:.3g}' if e < len(scores) else '' for e in row['kept']),
      dropped=tuple(row['dropped']),
  )


def _variant(values: Mapping[str, Any], sizes: Mapping[str, Any], key: str, name: str) -> Variant:
  evaluation = values.get('evaluation') or {}
  agreement = evaluation.get('agreement') or {}
  loss = evaluation.get('content_loss', sizes.get('loss'))
  seconds = values.get('seconds')
  if seconds is None and values.get('steps'):
    seconds = math.fsum(step.get('seconds', 0.0) for step in values['steps'])
  return Variant(
      key=values.get('key', key), name=values.get('name', name), note=values.get('note', ''),
      sizes=sizes, loss=loss, accuracy=evaluation.get('content_accuracy'),
      agreement=agreement.get('top1'), kl=agreement.get('kl'), seconds=seconds,
      layers=merge_layers(values.get('layers') or ()),
      routing={p: r['load'] for p, r in (evaluation.get('routing') or {}).items()},
  )


def _sizes(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  sizes = values.get(name)
  if not isinstance(sizes, Mapping) or 'stored_bytes' not in sizes:
    raise UserError(f'report: {name!r} is missing or has no stored_bytes: compress again')
  return sizes


def parse(values: Mapping[str, Any]) -> Report:
  """Reads a report.json object, of one compression or of a comparison.

  Raises:
    UserError: a part that every report has is missing.
  """
  rows = values.get('variants')
  if rows:
    variants = tuple(
        _variant(row, _sizes(row, 'after'), f'variant_{i}', f'Variant {i}')
        for i, row in enumerate(rows)
    )
    wanted = values.get('headline', variants[-1].key)
    headline = next((v for v in variants if v.key == wanted), None)
    if headline is None:
      raise UserError(f'report: headline {wanted!r} is none of {[v.key for v in variants]}')
  else:
    names = [step.get('transform', 'compressed') for step in values.get('steps', ())]
    first = Variant(key='before', name='Uncompressed', sizes=_sizes(values, 'before'),
                    loss=values['before'].get('loss'))
    headline = _variant(values, _sizes(values, 'after'), 'after', ' + '.join(names) or 'Compressed')
    variants = (first, headline)
  return Report(
      title=values.get('title', 'Compression report'), source=str(values.get('source', '')),
      variants=variants, headline=headline, baselines=dict(values.get('baselines') or {}),
      facts=dict(values.get('facts') or {}), training=dict(values.get('training') or {}),
      samples=tuple(values.get('samples') or ()), model=dict(values.get('model') or {}),
      fates=() if rows else fates(values.get('layers') or ()),
      neurons_run={} if rows else {
          row['path']: float(row['neurons_run']) for row in values.get('layers') or ()
          if row.get('neurons_run') is not None
      },
  )
