"""The pictures of a report, each a function Report -> SVG text; colours live in the page's CSS."""

from collections.abc import Mapping, Sequence
import math

from moejax.report import svg
from moejax.report.data import Report, Variant

WIDTH = 460.0
PARTS = (
    ('experts', 'experts', 'p0'),
    ('embedding', 'word tables', 'p1'),
    ('attention', 'attention', 'p2'),
    ('dense_ffn', 'dense layers', 'p3'),
    ('other', 'router, norms', 'p4'),
)

# Losses to hold a model against: (name in `Report.baselines`, what the pictures call it).
BASELINES = (
    ('bigram_content_loss', 'guessing from the word before'),
    ('zeroed_experts_content_loss', 'experts switched off'),
)


def colour(report: Report, variant: Variant) -> str:
  """The CSS class of a variant: c0 for the uncompressed model, then c1, c2 ..."""
  return f'c{min(report.variants.index(variant), 7)}'


def megabytes(count: float) -> str:
  """12.3 MB, 456 kB."""
  if count >= 9.95e5:
    return f'{count / 1e6:,.1f} MB' if count < 9.995e8 else f'{count / 1e9:,.2f} GB'
  return f'{count / 1e3:,.0f} kB' if count >= 1e3 else f'{count:,.0f} B'


def layer_label(path: str) -> str:
  """'encoder/layers_1/ffn/experts/wi' -> 'encoder 1 · wi', '.../ffn' -> 'encoder 1'."""
  names = path.split('/')
  layer = next((n.removeprefix('layers_') for n in names if n.startswith('layers_')), '')
  head = f'{names[0]} {layer}'.strip()
  return f'{head} · {names[-1]}' if 'experts' in names else head


def loss_against_bits(report: Report) -> str:
  """Each variant's loss over its stored bits an expert weight, the latter on a doubling scale."""
  shown = [v for v in report.variants if v.loss is not None and v.bits]
  height, left, right, top, bottom = 340.0, 44.0, 14.0, 26.0, 44.0
  picture = svg.Picture(WIDTH, height, 'Loss against stored bits per expert weight')
  if not shown:
    picture.text(WIDTH / 2, height / 2, 'not measured', 'label', 'middle')
    return picture.render()
  lines = [(name, report.baselines[key]) for key, name in BASELINES if key in report.baselines]
  losses: list[float] = [float(v.loss or 0.0) for v in shown] + [float(u) for _, u in lines]
  bits_shown = [float(v.bits or 1.0) for v in shown]
  low, high = min(losses), max(losses)
  pad = max(0.08 * (high - low), 0.05)
  low, high = low - pad, high + pad
  octaves = (min(-1.0, math.floor(math.log2(min(bits_shown)))), 4.15)
  x = lambda bits: left + 12 + (math.log2(bits) - octaves[0]) / (octaves[1] - octaves[0]) * (
      WIDTH - left - right - 12
  )
  y = lambda loss: top + (high - loss) / (high - low) * (height - top - bottom)

  for tick in svg.ticks(low, high, 5):
    picture.line(left, y(tick), WIDTH - right, y(tick), 'grid')
    picture.text(left - 8, y(tick) + 4, f'{tick:.4g}', 'tick', 'end')
  for octave in range(int(octaves[0]), 5):
    picture.text(x(2.0**octave), height - bottom + 18, f'{2.0**octave:g}', 'tick', 'middle')
  picture.text(left - 34, 14, f'loss, nats a {report.target} (lower is better)', 'axis-name')
  picture.text(
      WIDTH - right, height - 6, 'bits stored for each expert weight', 'axis-name', 'end'
  )
  for _, value in lines:
    picture.line(left, y(value), WIDTH - right, y(value), 'reference')

  middle = x(4.0)
  left_side = [v for v in shown if x(v.bits) < middle]
  right_side = [v for v in shown if x(v.bits) >= middle]
  bounds = (top + 4, height - bottom - 4)
  places = svg.spread_labels([y(v.loss) for v in left_side], 15.0, *bounds)
  for v, place in zip(left_side, places):
    _leader(picture, x(v.bits), y(v.loss), x(v.bits) + 13, place)
    picture.text(x(v.bits) + 16, place + 4, v.name, _label_style(report, v))
  wanted = [y(v.loss) - 14 for v in right_side] + [y(value) - 7 for _, value in lines]
  places = svg.spread_labels(wanted, 15.0, *bounds)
  for v, place in zip(right_side, places):
    picture.text(WIDTH - right, place + 4, v.name, _label_style(report, v), 'end')
  for (name, _), place in zip(lines, places[len(right_side):]):
    picture.text(WIDTH - right, place + 4, name, 'reference-name', 'end')
  for v in shown:
    tip = f'{v.name}: {v.bits:.3f} bits a weight, loss {v.loss:.3f}'
    size = 7.5 if v is report.headline else 5.5
    picture.circle(x(v.bits), y(v.loss), size, f'dot {colour(report, v)}', tip)
  return picture.render()


def _label_style(report: Report, variant: Variant) -> str:
  return 'label strong' if variant is report.headline else 'label'


def _leader(picture: svg.Picture, x1: float, y1: float, x2: float, y2: float) -> None:
  if abs(y2 - y1) > 3:
    picture.path([(x1, y1), (x2, y2)], 'leader')


def error_and_zeros(report: Report) -> str:
  """For each expert weight: the share of its output that was lost, and of weights that are zero."""
  shown = [v for v in report.compressed if v.layers]
  paths = list(dict.fromkeys(row.path for v in shown for row in v.layers))
  step, top, left, gap = 30.0, 50.0, 104.0, 30.0
  height = top + step * max(len(paths), 1) + 30
  picture = svg.Picture(WIDTH, height, 'Output error and share of zeros for each expert weight')
  if not paths:
    picture.text(WIDTH / 2, height / 2, 'no layer was compressed', 'label', 'middle')
    return picture.render()
  width = (WIDTH - left - gap - 14) / 2
  worst = max(row.relative_output_error for v in shown for row in v.layers)
  limit = max(svg.ticks(0, max(worst, 0.01) * 1.3, 4)[-1], worst)
  panels = (
      (left, limit, 'relative_output_error', 'output lost'),
      (left + width + gap, 1.0, 'zeros', 'weights at zero'),
  )
  for i, path in enumerate(paths):
    middle = top + step * (i + 0.5)
    picture.text(left - 12, middle + 4, layer_label(path), 'label', 'end')
  for start, scale, field, title in panels:
    picture.text(start, 14, title, 'label')
    at = lambda value, start=start, scale=scale: start + value / scale * width
    for tick in svg.ticks(0, scale, 2 if scale == 1.0 else 3):
      picture.line(at(tick), top - 12, at(tick), height - 26, 'grid')
      anchor = 'start' if tick == 0 else 'end' if tick > 0.9 * scale else 'middle'
      picture.text(at(tick), top - 17, f'{tick:.0%}', 'tick', anchor)
    for i, path in enumerate(paths):
      middle = top + step * (i + 0.5)
      rows = [(v, r) for v in shown for r in v.layers if r.path == path]
      values = [getattr(r, field) for _, r in rows]
      picture.line(at(min(values)), middle, at(max(values)), middle, 'span')
      for v, row in rows:
        value = getattr(row, field)
        tip = f'{v.name}, {layer_label(path)}: {value:.1%} {title}'
        picture.circle(at(value), middle, 5.0, f'dot {colour(report, v)}', tip)
  return picture.render()


def expert_load(report: Report) -> str:
  """Share of the tokens each expert gets: bars after compression, ticks before."""
  after = report.headline.routing
  before: Mapping[str, Sequence[float]] = report.before.routing
  paths = [p for p in before if p in after] or list(after)
  block, left, top = 132.0, 40.0, 20.0
  height = max(top + block * len(paths), 60.0)
  picture = svg.Picture(WIDTH, height, 'Share of the tokens of each expert before and after')
  if not paths:
    picture.text(WIDTH / 2, 34, 'routing was not measured', 'label', 'middle')
  for k, path in enumerate(paths):
    shares, old = list(after[path]), list(before.get(path, ()))
    base, room = top + block * k + 96, 70.0
    most = max([*shares, *old, 2.0 / len(shares)])
    y = lambda share, base=base, most=most: base - share / most * room
    slot = (WIDTH - left - 14) / len(shares)
    width = min(slot * 0.68, 34.0)
    picture.text(left - 30, base - room - 12, layer_label(path), 'axis-name')
    for tick in svg.ticks(0, most, 3):
      picture.line(left, y(tick), WIDTH - 14, y(tick), 'grid')
      picture.text(left - 6, y(tick) + 4, f'{tick:.0%}', 'tick', 'end')
    even = 1.0 / len(shares)
    picture.line(left, y(even), WIDTH - 14, y(even), 'reference')
    style = colour(report, report.headline)
    for e, share in enumerate(shares):
      x = left + slot * (e + 0.5)
      was = f', {old[e]:.1%} before' if old else ''
      picture.rect(
          x - width / 2, y(share), width, base - y(share), f'bar {style}', radius=2.0,
          tip=f'expert {e + 1}: {share:.1%} of the words{was}',
      )
      if old:
        picture.line(x - slot * 0.42, y(old[e]), x + slot * 0.42, y(old[e]), 'before')
      if len(shares) <= 32 or e % 8 == 0:
        picture.text(x, base + 14, str(e + 1), 'tick', 'middle')
  return picture.render()


def byte_parts(sizes: Mapping[str, object]) -> dict[str, float]:
  """Bytes of the parts in PARTS; without `bytes_by_part` only experts and the rest are known."""
  by_part = dict(sizes.get('bytes_by_part') or {})  # type: ignore[call-overload]
  if not by_part:
    total, experts = float(sizes['stored_bytes']), float(sizes.get('expert_bytes', 0))  # type: ignore[arg-type]
    return {'experts': experts, 'other': total - experts}
  known = {name for name, _, _ in PARTS}
  parts = {name: float(by_part.get(name, 0)) for name, _, _ in PARTS}
  parts['other'] += float(sum(n for name, n in by_part.items() if name not in known))
  return parts


def bytes_by_part(report: Report) -> str:
  """Stored bytes of every variant as a bar of its parts, all on one scale."""
  step, top = 46.0, 6.0
  height = top + step * len(report.variants) + 8
  picture = svg.Picture(WIDTH, height, 'Stored bytes of each model by part')
  most = max(v.stored_bytes for v in report.variants)
  room = WIDTH - 14 - 78
  for i, v in enumerate(report.variants):
    y = top + step * i
    picture.text(0, y + 14, v.name, _label_style(report, v))
    x = 0.0
    parts = byte_parts(v.sizes)
    for name, label, style in PARTS:
      size = parts.get(name, 0.0)
      width = size / most * room
      if width > 0:
        tip = f'{v.name}: {label} {megabytes(size)}'
        picture.rect(x, y + 20, max(width - 1.0, 0.6), 16, style, radius=2.0, tip=tip)
      x += width
    picture.text(x + 7, y + 33, megabytes(v.stored_bytes), 'label strong')
  return picture.render()


def training_curve(report: Report) -> str:
  """Loss of the live training steps, faint, and its running mean; empty without a curve."""
  curve = [(float(s), float(loss)) for s, loss in report.training.get('curve') or ()]
  if len(curve) < 2:
    return ''
  all_width, height, left, bottom, top = 2 * WIDTH + 60, 190.0, 44.0, 26.0, 12.0
  picture = svg.Picture(all_width, height, 'Training loss during the live minutes')
  losses = [loss for _, loss in curve]
  low, high = min(losses), max(losses)
  low, high = low - 0.05 * (high - low) - 0.02, high + 0.05 * (high - low) + 0.02
  first, last = curve[0][0], curve[-1][0]
  x = lambda s: left + (s - first) / max(last - first, 1.0) * (all_width - left - 40)
  y = lambda loss: top + (high - loss) / (high - low) * (height - top - bottom)
  for tick in svg.ticks(low, high, 4):
    picture.line(left, y(tick), all_width - 14, y(tick), 'grid')
    picture.text(left - 8, y(tick) + 4, f'{tick:.3g}', 'tick', 'end')
  for tick in svg.ticks(first, last, 4):
    picture.text(x(tick), height - 8, f'step {tick:,.0f}', 'tick', 'middle')
  picture.path([(x(s), y(loss)) for s, loss in curve], 'faint')
  mean, smooth = losses[0], []
  for s, loss in curve:
    mean = 0.8 * mean + 0.2 * loss
    smooth.append((x(s), y(mean)))
  picture.path(smooth, f'curve {colour(report, report.headline)}')
  return picture.render()
