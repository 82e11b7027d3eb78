"""Measurements to comparisons, and comparisons to tables for the terminal and for a file."""

from collections.abc import Iterable, Mapping, Sequence
import math
import pathlib
import statistics
from typing import Any

from moejax import errors

TITLES = {
    'forward': 'Forward pass of a switch-base-8, float32, no token dropped',
    'gptq': 'Batched ternary GPTQ, blocks of 128 (outputs x inputs)',
    'experts': 'Expert feed-forward 768 -> 3072 -> 768, float32',
    'codec': 'Ternary formats and products with one expert (outputs x inputs)',
    'decoder': 'A Phi-MoE of hidden 512, 8 layers, 16 experts, two a token',
    'merge': 'Merging and pruning one layer; statistics (ours) against loops over tokens (peer)',
    'fewer': 'A Mixtral of width 256, 4 layers, 16 experts, compressed, against itself before',
    'neurons': 'A share of the neurons of a layer 768x3072, router included, against all of them',
    'clusters': 'Neurons into experts of equal size',
    'products': 'A product with one expert on CPU, below four bits a weight and in float32',
    'schedules': 'TPU kernels, not run: bundles for 2048 x 512 weights, and cycles to read them',
    'card': 'Grouped products on an NVIDIA card, against bfloat16 by XLA',
    'c2048': 'Switch-c-2048, 1.6T parameters, as codes of blocks below one bit a weight',
    'equal': 'Training that MoE (ours) against a dense decoder of equal active parameters (peer)',
}
# (part, metric): how many times better than the peer ours should be.
TARGETS = {
    ('forward', 'forward pass'): 1.3,
    ('gptq', 'outside the factorisations'): 2.0,
    ('gptq', 'in total'): 1.0,
    ('merge', 'usage and router similarity'): 100.0,
    ('fewer', 'statistics for REAP'): 0.67,
    ('fewer', 'forward pass'): 1.0,
    ('fewer', '32 tokens after 32, greedy'): 1.0,
    ('neurons', '1 token'): 3.0,
    ('neurons', '8 tokens'): 1.5,
    ('neurons', '16 tokens'): 1.5,
    ('neurons', '64 tokens'): 1.5,
    ('neurons', '512 tokens'): 2.0,
    **{
        ('neurons', f'{tokens} at {share} %'): 0.95
        for tokens in ('1 token', '8 tokens', '64 tokens', '512 tokens') for share in (50, 100)
    },
    ('products', 'ternary, two bits, two levels'): 1.0,
    ('products', 'ternary, two bits, one level'): 1.0,
    ('products', 'ternary, below one bit'): 0.5,
    **{('products', f'{bits}-bit with scale and zero'): 1.0 for bits in (2, 3, 4)},
    **{('card', f'1 row each: two bits, {n}, Mosaic'): 4.0 for n in ('one level', 'two levels')},
    ('card', '1 row each: below one bit'): 1.5,
    ('c2048', 'stored'): 1.0,
    ('c2048', 'in one H200'): 1.0,
    ('products', 'ternary, below one bit, for a kernel'): 0.5,
    ('clusters', 'balanced clusters'): 1.0,
    ('clusters', 'their objective'): 1.0,
    ('decoder', 'forward pass'): 1.2,
    ('decoder', 'training step'): 1.2,
    ('decoder', '32 tokens after 32, greedy'): 3.0,
}
HEADER = ('what', 'ours', 'peer', 'ratio', 'target', 'verdict')
MARKER = '<!-- Everything above is generated; what follows is written by hand and kept. -->'
# Numbers that show whether two sides did the same work may differ by rounding.
_SAME = 0.01


def summary(samples: Sequence[float]) -> dict[str, Any]:
  """Median, least, greatest and all samples."""
  return {
      'median': statistics.median(samples), 'min': min(samples), 'max': max(samples),
      'samples': list(samples),
  }


def merge(runs: Iterable[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
  """One measurement for each (part, case, metric, who) of all rounds' rows, samples pooled.

  Args:
    runs: (part, row of `timing.row`) of every round.
  """
  merged: dict[tuple[str, ...], dict[str, Any]] = {}
  for part, row in runs:
    key = (part, row['case'], row['metric'], row['who'])
    if key in merged:
      merged[key]['samples'] += row['samples']
    else:
      merged[key] = {'part': part, **row, 'samples': list(row['samples'])}
  return [{**row, **summary(row['samples'])} for row in merged.values()]


def same_work(ours: Mapping[str, float], peer: Mapping[str, float]) -> bool:
  """Whether both sides report the same numbers of what they did."""
  return ours.keys() == peer.keys() and all(
      math.isclose(ours[n], peer[n], rel_tol=_SAME) for n in ours
  )


def verdict(part: str, ours: Mapping[str, Any], peer: Mapping[str, Any]) -> dict[str, Any]:
  """Ratio, target and verdict of two measurements of the same thing."""
  a, b = ours['median'], peer['median']
  ratio = a / b if ours['unit'].endswith('/s') else b / a if a else None
  target = TARGETS.get((part, ours['metric']))
  if not same_work(ours['work'], peer['work']):
    return {'ratio': None, 'target': target, 'verdict': 'not the same work'}
  if ours['unit'] == '%':
    return {'ratio': None, 'target': None, 'verdict': ''}
  if target is None or ratio is None:
    return {'ratio': ratio, 'target': target, 'verdict': 'no target'}
  return {'ratio': ratio, 'target': target, 'verdict': 'met' if ratio >= target else 'missed'}


def compare(
    measurements: Sequence[Mapping[str, Any]], skipped: Mapping[str, str]
) -> list[dict[str, Any]]:
  """A row for every peer of every measurement of ours; a missing side is 'not measured'.

  Args:
    measurements: from `merge`.
    skipped: part -> why one of its sides is missing.
  """
  sides = ('value', 'min', 'max')
  short = lambda m: m and dict(zip(sides, (m['median'], m['min'], m['max'])), who=m['who'])
  rows = []
  for part, case, metric in dict.fromkeys((m['part'], m['case'], m['metric'])
                                          for m in measurements):
    here = [m for m in measurements if (m['part'], m['case'], m['metric']) == (part, case, metric)]
    ours = next((m for m in here if m['ours']), None)
    peers: list[Any] = [m for m in here if not m['ours']]
    missing = {'ratio': None, 'target': TARGETS.get((part, metric)), 'verdict': 'not measured'}
    if not peers:
      peers = [None]
      if part not in skipped:
        missing = {'ratio': None, 'target': None, 'verdict': ''}
    for peer in peers:
      found = verdict(part, ours, peer) if ours and peer else missing
      rows.append({
          'part': part, 'case': case, 'metric': metric, 'unit': here[0]['unit'],
          'ours': short(ours), 'peer': short(peer), **found,
      })
  return rows


def number(value: float, unit: str) -> str:
  """A value in a unit that suits it, three digits."""
  scale, name = 1.0, unit
  if unit == 's' and value < 1:
    scale, name = (1e3, 'ms') if value >= 1e-3 else (1e6, 'us')
  elif unit == 'weights/s':
    scale, name = 1e-6, 'M/s'
  elif unit in ('bytes', 'FLOPs'):
    scale, name = 1e-6, {'bytes': 'MB', 'FLOPs': 'M'}[unit]
  elif unit == '%':
    return f'{value:.0f} %'
  elif unit == 'GB':
    return f'{value:.1f} GB'
  elif unit == 'bits a weight':
    name = 'bits'
  value *= scale
  digits = 0 if value >= 100 else 1 if value >= 10 else 2
  return f'{value:.{3 if name == "bits" else digits}f} {name}'


def cell(side: Mapping[str, Any] | None, unit: str, *, name: bool) -> str:
  """Median (least to greatest), the peer's name before it."""
  if side is None:
    return '-'
  text = number(side['value'], unit)
  if side['min'] != side['max']:
    text += f' ({number(side["min"], unit)} to {number(side["max"], unit)})'
  return f'{side["who"]}: {text}' if name else text


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
  """A comparison as the texts under HEADER."""
  ratio, target = (f'{row[k]:.2f}' if row[k] is not None else '-' for k in ('ratio', 'target'))
  return (
      f'{row["case"]}: {row["metric"]}', cell(row['ours'], row['unit'], name=False),
      cell(row['peer'], row['unit'], name=True), ratio, target, row['verdict'] or '-',
  )


def preamble(result: Mapping[str, Any]) -> list[str]:
  """Machine, settings, versions and what is missing, a line each."""
  m, s = result['machine'], result['settings']
  lines = [
      f'Machine: {m["cpu"]}, {m["cores"]} cores, {m["memory_gb"]} GB, {m["system"]}.',
      f'Every worker is held to {s["threads"]} threads on CPUs {s["cpus"]}; peers in turn, rounds: '
      f'{s["rounds"]}; medians (least to greatest).',
      'A ratio over 1 means that ours is that many times better.',
  ]
  if s['quick']:
    lines.append('Sizes are those of --quick: they show that everything runs, and nothing else.')
  if m['load_before'] > 0.5:
    lines.append(f'The machine was not quiet: load average {m["load_before"]} before the run.')
  # Sorted, for JSON files come back with their keys in order.
  environments = {', '.join(f'{n} {v}' for n, v in sorted(w['versions'].items()))
                  for w in result['workers'].values() if w['versions']}
  lines += [f'Environment: {versions}.' for versions in sorted(environments)]
  lines += [f'Not measured: {part}: {why}.' for part, why in sorted(result['skipped'].items())]
  return lines


def parts(result: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
  """(title, rows of cells) of each part that has any."""
  rows = result['comparisons']
  names = dict.fromkeys(row['part'] for row in rows)
  return [(TITLES[n], [cells(row) for row in rows if row['part'] == n]) for n in names]


def text(result: Mapping[str, Any]) -> str:
  """All tables for a terminal."""
  out = preamble(result)
  for title, rows in parts(result):
    widths = [max(len(line[i]) for line in (HEADER, *rows)) for i in range(len(HEADER))]
    pad = lambda line: '  '.join(c.ljust(w) for c, w in zip(line, widths)).rstrip()
    out += ['', title, pad(HEADER), '  '.join('-' * w for w in widths), *map(pad, rows)]
  return '\n'.join(out)


def markdown(result: Mapping[str, Any], command: str) -> str:
  """The generated half of a results page, with the marker at its end."""
  out = [
      '# Benchmarks', '', f'Printed by `{command}`. Each peer runs in a process of its own.', '',
      *(f'- {line}' for line in preamble(result)),
  ]
  for title, rows in parts(result):
    line = lambda row: '| ' + ' | '.join(row) + ' |'
    out += ['', f'## {title}', '', line(HEADER), '|---' * len(HEADER) + '|', *map(line, rows)]
  return '\n'.join([*out, '', MARKER])


def by_hand(path: pathlib.Path) -> str:
  """What stands below the marker of a results page.

  Raises:
    UserError: the file exists and has no marker, so that all of it might be somebody's.
  """
  if not path.exists():
    return '\n\n## Misses and their causes\n'
  try:
    _, found, rest = path.read_text(encoding='utf-8').partition(MARKER)
  except (OSError, ValueError) as error:
    raise errors.UserError(f'cannot read {path} ({error}): name another file') from error
  if not found:
    raise errors.UserError(
        f'{path} has no line {MARKER!r}: put it above what is to be kept, or name another file'
    )
  return rest
