"""What a run of the study measured, short enough to commit."""

from collections.abc import Iterable, Mapping
import json
import pathlib
import statistics
from typing import Any

MEANS = ('load_entropy', 'router_entropy', 'dropped', 'gates_of_one', 'no_router_gradient')


def of_lines(lines: Iterable[str]) -> dict[str, Any]:
  """The record of a run from the lines of its metrics.jsonl.

  Returns:
    tokens_per_step. tokens_per_second: the median over intervals, evaluation left out. evaluations:
    step, validation loss in nats a token, and the means of MEANS where the model has routers. load:
    by layer, the experts' shares at the last evaluation.
  """
  rows = [json.loads(line) for line in lines]
  train = [row for row in rows if row['kind'] == 'train' and 'seconds_per_step' in row]
  evaluations = [row for row in rows if row['kind'] == 'eval']
  last = evaluations[-1] if evaluations else {}
  return {
      'tokens_per_step': round(statistics.median(
          row['tokens_per_second'] * row['seconds_per_step'] for row in train
      )),
      'tokens_per_second': statistics.median(row['tokens_per_second'] for row in train),
      'evaluations': [
          {'step': row['step'], 'loss': row['loss'],
           **{name: row[name] for name in MEANS if name in row}}
          for row in evaluations
      ],
      'load': {
          name.removeprefix('load/'): share for name, share in last.items()
          if name.startswith('load/')
      },
  }


def of_run(workdir: pathlib.Path) -> dict[str, Any]:
  """The record of a finished run's folder."""
  return of_lines((workdir / 'metrics.jsonl').read_text().splitlines())


def by_variant(runs: Mapping[str, Any], corpus: str) -> dict[str, list[Any]]:
  """Variant -> its runs on a corpus, one a seed; names are corpus/variant/seed."""
  grouped: dict[str, list[Any]] = {}
  for name, run in sorted(runs.items()):
    where, variant, _ = name.split('/')
    if where == corpus:
      grouped.setdefault(variant, []).append(run)
  return grouped
