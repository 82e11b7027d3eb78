"""What the pages of experiments share: records, figures as text and PNG, words kept by hand."""

from collections.abc import Mapping, Sequence
import io
import pathlib
import statistics
from typing import Any

import jax

from experiments.bench import suites
from moejax import errors, files

MARKER = '<!-- written by hand below -->'


def opened(out: pathlib.Path, about: Mapping[str, Any], **empty: Any) -> dict[str, Any]:
  """The record at `out`, or a new one of this machine: `about`, and `empty` to be filled.

  Raises:
    UserError: what is there was made with other settings than `about`.
  """
  if not out.exists():
    return {'machine': suites.machine(), 'jax': jax.__version__, **about, **empty}
  result: dict[str, Any] = files.read_json(out)
  for name, value in about.items():
    if result[name] != value:
      raise errors.UserError(f'{out} holds runs with {name} = {result[name]!r}: see --out')
  return result


def spread(values: Sequence[float], digits: int = 3) -> str:
  """Mean and, of several, the sample standard deviation."""
  mean = f'{statistics.fmean(values):.{digits}f}'
  return f'{mean} ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else mean


def plots() -> Any:
  """pyplot, on no display."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  return pyplot


def png(figure: Any) -> bytes:
  """The figure as a file, closed."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=130)
  plots().close(figure)
  return buffer.getvalue()


def write(path: pathlib.Path, text: str) -> None:
  """A page; what stands below its marker is kept."""
  by_hand = (path.read_text() if path.exists() else '').partition(MARKER)[2] or '\n'
  files.write_whole(path, f'{text}\n{MARKER}{by_hand}')
