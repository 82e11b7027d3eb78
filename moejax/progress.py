"""How far long work is, on stderr with the time left."""

from collections.abc import Iterable
import sys
from typing import Any

import tqdm

# Between two notes on a terminal, and elsewhere; no note before the first has passed.
_SECONDS = (0.2, 15.0)


def bar(
    items: Iterable[Any] | None = None, *, label: str, total: int | None = None,
    unit: str = 'it', show: bool = True,
) -> tqdm.tqdm:
  """A progress bar to iterate over, or to call `update()` and `close()` on.

  In place on a terminal; elsewhere a note now and then, and none for work of a few seconds.
  """
  seconds = _SECONDS[not sys.stderr.isatty()]
  return tqdm.tqdm(
      items, desc=label, total=total, unit=unit, disable=not show, mininterval=seconds,
      delay=min(seconds, 5.0), dynamic_ncols=True,
  )


def blocks(share: float, width: int = 12) -> str:
  """A bar for a log line: `share` of `width` blocks filled."""
  filled = round(width * min(max(share, 0.0), 1.0))
  return '█' * filled + '·' * (width - filled)


def clock(seconds: float) -> str:
  """1h02m, 3m20s or 12s."""
  seconds = int(max(seconds, 0))
  hours, minutes = seconds // 3600, seconds // 60 % 60
  if hours:
    return f'{hours}h{minutes:02}m'
  return f'{minutes}m{seconds % 60:02}s' if minutes else f'{seconds}s'
