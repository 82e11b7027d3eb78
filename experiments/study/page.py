"""The page and the pictures of the study."""

from collections.abc import Mapping
import io
import statistics
from typing import Any

from experiments import pages
from experiments.study import records
from moejax.errors import UserError

LABELS = {
    'dense': 'dense', 'switch': 'Switch, top-1', 'gshard': 'GShard, top-2',
    'grin': 'SparseMixer-v2, top-2', 'grin_local': 'SparseMixer-v2, local balance',
}
_COLOURS = {
    'dense': '#777777', 'switch': '#c1666b', 'gshard': '#d4a017', 'grin': '#2a6f97',
    'grin_local': '#61a5c2',
}
CORPORA = {'speeches': 'State of the Union', 'mix': 'speeches, essays and manuals'}


def rows(result: Mapping[str, Any], corpus: str) -> list[list[str]]:
  """A row a variant: seeds, steps, last loss, speed, and the routers' health."""
  grouped, rounds = records.by_variant(result['runs'], corpus), result['speeds']
  out = []
  for variant in filter(grouped.__contains__, LABELS):
    own = grouped[variant]
    last = [run['evaluations'][-1] for run in own]
    speed = statistics.median(at[variant] for at in rounds)
    relative = statistics.median(at[variant] / at['dense'] for at in rounds)
    mean = lambda name, last=last: (
        pages.spread([row[name] for row in last], 2) if name in last[0] else ''
    )
    out.append([
        LABELS[variant], str(len(own)), str(last[0]['step']),
        pages.spread([row['loss'] for row in last], 4), f'{speed:,.0f}', f'{relative:.0%}',
        mean('router_entropy'), mean('load_entropy'), mean('dropped'), mean('no_router_gradient'),
    ])
  return out


_COLUMNS = (
    'variant', 'seeds', 'steps', 'validation loss, nats a token', 'tokens/s', 'of dense',
    'router entropy', 'load entropy', 'dropped', 'tokens without router gradient',
)


def markdown(result: Mapping[str, Any]) -> str:
  """The written part of the page, what stands before the marker."""
  lines = [
      '# What gradient-informed routing buys at a small scale', '',
      f'Written by `python -m experiments.study` on {result["machine"]["cpu"]}, '
      f'{result["machine"]["cores"]} cores; jax {result["jax"]}. Config and seeds: '
      '`configs/grin_tiny.py`; every run in `evidence/study.json`. Losses are means over seeds '
      'with the sample standard deviation. Speeds are medians over '
      f'{len(result["speeds"])} rounds in which the variants took turns, shares of dense those '
      'within a round; seconds in the pictures follow from them, evaluation and compilation left '
      'out. Entropies are in nats: ln 8 = 2.08 is even.', '',
  ]
  for corpus, title in CORPORA.items():
    table = rows(result, corpus)
    if table:
      lines += [f'## On {title}', '']
      lines += ['| ' + ' | '.join(cells) + ' |' for cells in (_COLUMNS, ['---'] * 10, *table)]
      lines += ['', f'![Loss, entropy and load](evidence/study_{corpus}.png)', '']
  return '\n'.join(lines).rstrip('\n') + '\n'


def draw(result: Mapping[str, Any], corpus: str) -> bytes:
  """PNG: loss by step and by time, router entropy by step, and expert load by layer.

  Raises:
    UserError: matplotlib is not installed.
  """
  try:
    from matplotlib import figure
  except ImportError as error:
    raise UserError("pictures need matplotlib: install 'moejax[report]'") from error
  grouped = records.by_variant(result['runs'], corpus)
  routed = [v for v in LABELS if v in grouped and grouped[v][0]['load']]
  canvas = figure.Figure(figsize=(13, 4 + 2.2 * len(routed)), dpi=100, layout='constrained')
  parts: Any = canvas.subfigures(2, 1, height_ratios=(4, 2.2 * max(len(routed), 1)))
  top, bottom = parts
  curves = top.subplots(1, 3)
  for variant in filter(grouped.__contains__, LABELS):
    speed = statistics.median(at[variant] for at in result['speeds'])
    _curves(curves, variant, grouped[variant], grouped[variant][0]['tokens_per_step'] / speed)
  for ax, (x, y) in zip(curves, (('step', 'validation loss (nats a token)'),
                                 ('seconds in steps', 'validation loss (nats a token)'),
                                 ('step', 'router entropy (nats)'))):
    ax.set(xlabel=x, ylabel=y)
    ax.grid(alpha=0.25)
  curves[0].legend(frameon=False, fontsize=8)
  if routed:
    _loads(bottom, {variant: grouped[variant][0]['load'] for variant in routed})
  canvas.suptitle(f'On {CORPORA[corpus]}: mean and range over seeds')
  content = io.BytesIO()
  canvas.savefig(content, format='png', metadata={'Software': None})
  return content.getvalue()


def _curves(axes: Any, variant: str, runs: list[Any], seconds_per_step: float) -> None:
  """One variant's three curves; a band from the least to the most over seeds."""
  steps = [row['step'] for row in runs[0]['evaluations']]
  at = lambda name: list(zip(*([row[name] for row in run['evaluations']] for run in runs)))
  colour, seconds = _COLOURS[variant], [step * seconds_per_step for step in steps]
  for ax, x, name in ((axes[0], steps, 'loss'), (axes[1], seconds, 'loss'),
                      (axes[2], steps, 'router_entropy')):
    if name in runs[0]['evaluations'][0]:
      values = at(name)
      ax.plot(x, [statistics.fmean(v) for v in values], color=colour, label=LABELS[variant])
      ax.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=colour,
                      alpha=0.2, lw=0)


def _loads(place: Any, loads: Mapping[str, Mapping[str, list[float]]]) -> None:
  """Bars of each expert's share, a row a variant and a column a layer, of the first seed."""
  layers = len(next(iter(loads.values())))
  grid = place.subplots(len(loads), layers, sharex=True, sharey=True, squeeze=False)
  for line, (variant, by_layer) in zip(grid, loads.items()):
    for ax, (path, share) in zip(line, by_layer.items()):
      ax.bar(range(len(share)), share, color=_COLOURS[variant])
      ax.axhline(1 / len(share), color='black', lw=0.6)
      ax.set_title(f'{LABELS[variant]}, {path.split("/")[-2]}', fontsize=8)
  for ax in grid[-1]:
    ax.set_xlabel('expert')
  for line in grid:
    line[0].set_ylabel('share of choices', fontsize=8)
