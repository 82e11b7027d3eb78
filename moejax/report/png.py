"""The overview pictures of a report as one PNG, drawn by matplotlib; colours are the page's."""

import importlib.resources
import io
import pathlib
import re
from typing import Any

from moejax import files
from moejax.errors import UserError
from moejax.report import charts
from moejax.report.data import Report

_WIDTH_PX = 960
_DPI = 100
_MOST_LAYERS = 4


def write_png(report: Report, path: str | pathlib.Path) -> pathlib.Path:
  """Draws loss against bits, bytes by part, error by layer and expert load into a PNG file.

  Raises:
    UserError: matplotlib is not installed, or the file cannot be written.
  """
  try:
    from matplotlib import figure, layout_engine, lines
  except ImportError as error:
    raise UserError("pictures need matplotlib: install 'moejax[report]'") from error
  rows = len(_error_paths(report))
  heights = [3.6, max(2.6, 0.36 * rows + 1.2)]
  canvas = figure.Figure(
      figsize=(_WIDTH_PX / _DPI, sum(heights) + 1.0), dpi=_DPI, facecolor=_colour('page'),
      layout=layout_engine.ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.1),
  )
  canvas.suptitle(report.title, fontsize=14, fontweight='bold', color=_colour('ink'))
  grid = canvas.add_gridspec(2, 2, height_ratios=heights)
  _loss(report, canvas.add_subplot(grid[0, 0]))
  _bytes(report, canvas.add_subplot(grid[0, 1]))
  _error(report, canvas.add_subplot(grid[1, 0]))
  _load(report, canvas, grid[1, 1])
  canvas.legend(
      handles=[
          lines.Line2D([], [], linestyle='', marker='o', label=v.name,
                       color=_colour(charts.colour(report, v))) for v in report.variants
      ],
      loc='outside lower center', ncol=min(len(report.variants), 6), frameon=False, fontsize=9,
      labelcolor=_colour('ink'), handletextpad=0.1, columnspacing=1.2,
  )
  content = io.BytesIO()
  canvas.savefig(content, format='png')
  path = pathlib.Path(path)
  files.write_whole(path, content.getvalue())
  return path


def _colour(name: str) -> str:
  """The light theme's colour `--name` of the page's style sheet."""
  style = importlib.resources.files('moejax.report').joinpath('style.css').read_text()
  found = re.search(rf'--{name}: (#\w+);', style)
  assert found is not None, name
  return found[1]


def _axes(axes: Any, title: str, xlabel: str = '', ylabel: str = '') -> None:
  axes.set_title(title, loc='left', fontsize=11, fontweight='bold', color=_colour('ink'))
  axes.set_xlabel(xlabel, fontsize=9, color=_colour('soft'))
  axes.set_ylabel(ylabel, fontsize=9, color=_colour('soft'))
  axes.set_facecolor(_colour('card'))
  axes.tick_params(labelsize=8.5, colors=_colour('soft'), length=0)
  for side in axes.spines.values():
    side.set_color(_colour('rule'))


def _nothing(axes: Any, text: str) -> None:
  axes.text(0.5, 0.5, text, transform=axes.transAxes, ha='center', color=_colour('soft'))
  axes.set_xticks([])
  axes.set_yticks([])


def _loss(report: Report, axes: Any) -> None:
  _axes(axes, 'Smaller against worse', 'bits stored for each expert weight',
        f'loss, nats a {report.target}')
  shown = [v for v in report.variants if v.loss is not None and v.bits]
  if not shown:
    _nothing(axes, 'not measured')
    return
  for key, name in charts.BASELINES:
    if key in report.baselines:
      axes.axhline(report.baselines[key], color=_colour('soft'), linestyle='--', linewidth=1)
      axes.annotate(name, (1, report.baselines[key]), (-4, 3), xycoords=('axes fraction', 'data'),
                    textcoords='offset points', ha='right', fontsize=8.5, color=_colour('soft'))
  for v in shown:
    style = charts.colour(report, v)
    axes.plot(v.bits, v.loss, 'o', color=_colour(style),
              markersize=9 if v is report.headline else 7)
  axes.set_xscale('log', base=2)
  axes.xaxis.set_major_formatter('{x:g}')
  axes.grid(axis='y', color=_colour('grid'))
  axes.margins(x=0.08, y=0.12)


def _bytes(report: Report, axes: Any) -> None:
  _axes(axes, 'Where the bytes are')
  names = [v.name for v in report.variants]
  left = [0.0] * len(names)
  for part, label, style in charts.PARTS:
    sizes = [charts.byte_parts(v.sizes).get(part, 0.0) for v in report.variants]
    if any(sizes):
      axes.barh(names, sizes, left=left, height=0.55, color=_colour(style), label=label)
      left = [a + b for a, b in zip(left, sizes)]
  for i, v in enumerate(report.variants):
    axes.annotate(charts.megabytes(v.stored_bytes), (left[i], i), (5, 0), va='center',
                  textcoords='offset points', fontsize=9, color=_colour('ink'))
  axes.invert_yaxis()
  axes.set_xlim(0, 1.22 * max(left))
  axes.set_xticks([])
  axes.tick_params(axis='y', colors=_colour('ink'))
  axes.legend(fontsize=8.5, frameon=False, labelcolor=_colour('ink'), loc='lower right')


def _error_paths(report: Report) -> list[str]:
  return list(dict.fromkeys(row.path for v in report.compressed for row in v.layers))


def _error(report: Report, axes: Any) -> None:
  _axes(axes, 'What each layer lost', 'share of its output')
  paths = _error_paths(report)
  if not paths:
    _nothing(axes, 'no layer was compressed')
    return
  labels = [charts.layer_label(path) for path in paths]
  for v in report.compressed:
    errors = {row.path: row.relative_output_error for row in v.layers}
    known = [i for i, path in enumerate(paths) if path in errors]
    axes.plot([errors[paths[i]] for i in known], known, 'o', markersize=6,
              color=_colour(charts.colour(report, v)))
  axes.set_yticks(range(len(paths)), labels)
  axes.tick_params(axis='y', colors=_colour('ink'))
  axes.set_ylim(len(paths) - 0.5, -0.5)
  axes.set_xlim(left=0)
  axes.xaxis.set_major_formatter(lambda x, _: f'{x:.0%}')
  axes.grid(color=_colour('grid'))


def _load(report: Report, canvas: Any, place: Any) -> None:
  after, before = report.headline.routing, report.before.routing
  paths = list(after)[:_MOST_LAYERS]
  if not paths:
    axes = canvas.add_subplot(place)
    _axes(axes, 'Words of each expert')
    _nothing(axes, 'routing was not measured')
    return
  colour = _colour(charts.colour(report, report.headline))
  inner = place.subgridspec(len(paths), 1, hspace=0.12)
  for i, path in enumerate(paths):
    axes = canvas.add_subplot(inner[i])
    first = 'Words of each expert (marks: before)' if i == 0 else ''
    _axes(axes, first, ylabel=charts.layer_label(path))
    numbers = range(1, len(after[path]) + 1)
    axes.bar(numbers, after[path], color=colour, width=0.7)
    if path in before:
      axes.plot(numbers, before[path], '_', color=_colour('ink'), markersize=9, markeredgewidth=2)
    axes.yaxis.set_major_formatter(lambda y, _: f'{y:.0%}')
    axes.locator_params(axis='y', nbins=3)
    axes.grid(axis='y', color=_colour('grid'))
    axes.set_axisbelow(True)
    axes.set_xlim(0.3, len(numbers) + 0.7)
    axes.tick_params(labelbottom=i == len(paths) - 1)
