"""One compression, or a comparison of several, as JSON, one self-contained HTML page and PNG."""

from collections.abc import Mapping
import os
import pathlib
from typing import Any

from moejax import files
from moejax.report.data import Report, parse
from moejax.report.page import render
from moejax.report.png import write_png

__all__ = ['Report', 'parse', 'render', 'write', 'write_png']


def write(
    values: Mapping[str, Any], folder: str | os.PathLike, *, picture: bool = False
) -> pathlib.Path:
  """Writes report.json and report.html into a folder; returns the path of the page.

  Args:
    values: the report.json object: source, steps, before, after, layers, and for a comparison
      variants; see `moejax.report.data`.
    picture: also write report.png, the page's overview charts; needs matplotlib.

  Raises:
    UserError: `values` lacks a required part, or the folder cannot be written.
  """
  parsed = parse(values)
  page = render(parsed)
  target = pathlib.Path(folder)
  try:
    target.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise files.os_error(target, error) from error
  files.write_whole(target / 'report.json', files.json_text(values, indent=2) + '\n')
  files.write_whole(target / 'report.html', page)
  if picture:
    write_png(parsed, target / 'report.png')
  return target / 'report.html'
