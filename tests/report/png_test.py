"""report.png: there, of a size to look at, with every model's colour in it."""

from pathlib import Path
import sys

from matplotlib import image
import numpy as np
import pytest

from moejax import report
from moejax.errors import UserError
from moejax.report import charts, png

sys.path.insert(0, str(Path(__file__).parent))
import comparison_example as common


def pixels(path):
  return np.round(image.imread(path)[..., :3] * 255).astype(int)


def shows(picture_hwc, colour):
  wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
  return (picture_hwc == wanted).all(-1).sum()


def test_every_model_and_part_is_drawn(tmp_path):
  report.write(common.comparison(), tmp_path, picture=True)
  assert {p.name for p in tmp_path.iterdir()} == {'report.json', 'report.html', 'report.png'}
  picture = pixels(tmp_path / 'report.png')
  assert 400 < picture.shape[0] < 1000 and 600 < picture.shape[1] <= 1000
  parsed = report.parse(common.comparison())
  for v in parsed.variants:
    assert shows(picture, png._colour(charts.colour(parsed, v))) > 20, v.name
  for _, label, style in charts.PARTS[:4]:
    assert shows(picture, png._colour(style)) > 20, label
  assert (tmp_path / 'report.png').stat().st_size < 300_000


def test_one_compression_without_measurements(tmp_path):
  values = common.comparison()
  del values['variants']
  values['steps'] = []
  report.write_png(report.parse(values), tmp_path / 'one.png')
  many = [{**row, 'path': f'encoder/layers_{i}/ffn/experts/wi'}
          for i in range(24) for row in values['layers'][:2]]
  report.write_png(report.parse({**values, 'layers': many}), tmp_path / 'many.png')
  one, other = pixels(tmp_path / 'one.png'), pixels(tmp_path / 'many.png')
  assert one.shape[1] == other.shape[1] and one.shape[0] < other.shape[0]


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  with pytest.raises(UserError, match='matplotlib'):
    report.write_png(report.parse(common.comparison()), tmp_path / 'x.png')
  report.write(common.comparison(), tmp_path)
  assert not list(tmp_path.glob('*.png'))
