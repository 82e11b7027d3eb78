"""A little SVG writer: shapes take CSS classes, so that one picture serves light and dark."""

from collections.abc import Sequence
import html
import math


def escape(text: object) -> str:
  """Text for HTML and SVG, quotes included."""
  return html.escape(str(text), quote=True)


def number(value: float, digits: int = 2) -> str:
  """A coordinate without needless digits."""
  text = f'{value:.{digits}f}'
  return text.rstrip('0').rstrip('.') if '.' in text else text


class Picture:
  """Shapes in a view box of `width` x `height` units; y grows downwards."""

  def __init__(self, width: float, height: float, label: str):
    self.width, self.height, self.label = width, height, label
    self._parts: list[str] = []

  def _add(
      self, tag: str, style: str, tip: str | None, body: str = '', **attributes: object
  ) -> None:
    written = ' '.join(
        f'{name.replace("_", "-")}="{number(v) if isinstance(v, float) else escape(v)}"'
        for name, v in attributes.items()
    )
    inner = (f'<title>{escape(tip)}</title>' if tip else '') + body
    self._parts.append(f'<{tag} class="{style}" {written}>{inner}</{tag}>')

  def line(self, x1: float, y1: float, x2: float, y2: float, style: str = 'axis') -> None:
    self._add('line', style, None, x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2))

  def rect(
      self, x: float, y: float, width: float, height: float, style: str, *, radius: float = 0.0,
      tip: str | None = None,
  ) -> None:
    self._add(
        'rect', style, tip, x=float(x), y=float(y), width=max(float(width), 0.0),
        height=max(float(height), 0.0), rx=float(radius),
    )

  def circle(self, x: float, y: float, r: float, style: str, tip: str | None = None) -> None:
    self._add('circle', style, tip, cx=float(x), cy=float(y), r=float(r))

  def path(self, points: Sequence[tuple[float, float]], style: str) -> None:
    steps = ' '.join(
        f'{"M" if i == 0 else "L"}{number(x)} {number(y)}' for i, (x, y) in enumerate(points)
    )
    self._add('path', style, None, d=steps)

  def text(
      self, x: float, y: float, text: str, style: str = 'label', anchor: str = 'start'
  ) -> None:
    self._add('text', style, None, escape(text), x=float(x), y=float(y), text_anchor=anchor)

  def render(self) -> str:
    return (
        f'<svg viewBox="0 0 {number(self.width)} {number(self.height)}" role="img" '
        f'aria-label="{escape(self.label)}">' + ''.join(self._parts) + '</svg>'
    )


def spread_labels(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
  """Moves label positions as little as needed, so that they are `gap` apart inside [low, high]."""
  order = sorted(range(len(wanted)), key=lambda i: wanted[i])
  clusters: list[tuple[float, list[int]]] = []
  for i in order:
    clusters.append((min(max(wanted[i], low), high), [i]))
    while len(clusters) > 1:
      (a, members_a), (b, members_b) = clusters[-2:]
      if b - a >= gap * (len(members_a) + len(members_b)) / 2:
        break
      count = len(members_a) + len(members_b)
      centre = (a * len(members_a) + b * len(members_b)) / count
      half = gap * (count - 1) / 2
      centre = min(max(centre, low + half), max(high - half, low + half))
      clusters[-2:] = [(centre, members_a + members_b)]
  placed = [0.0] * len(wanted)
  for centre, members in clusters:
    for k, i in enumerate(members):
      placed[i] = centre + gap * (k - (len(members) - 1) / 2)
  return placed


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """About `count` round values inside [low, high]."""
  span = max(high - low, 1e-9)
  raw = span / max(count, 1)
  scale = 10 ** math.floor(math.log10(raw))
  step = next(s * scale for s in (1, 2, 2.5, 5, 10) if s * scale >= raw)
  first = math.ceil(low / step - 1e-9)
  return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]
