"""experiments.estimators as a command: the numbers it writes, the picture, and mistakes."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCALES, EXPERTS = (0.2, 1.0), (2, 3)


def run(*args):
  flags = re.sub(r'--xla_force_host_platform_device_count=\d+', '', os.environ['XLA_FLAGS'])
  return subprocess.run(
      [sys.executable, '-m', 'experiments.estimators', *args], capture_output=True, text=True,
      cwd=ROOT, env={**os.environ, 'XLA_FLAGS': flags},
  )


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  out = tmp_path_factory.mktemp('estimators') / 'small'
  scales = [f'--scales={s}' for s in SCALES]
  done = run(f'--out={out}', '--problems=5', *scales, *(f'--experts={e}' for e in EXPERTS))
  assert done.returncode == 0, done.stderr
  assert str(out) in done.stdout
  return out


@pytest.mark.long
def test_what_is_exact_is_zero_and_the_rest_is_not(written):
  result = json.loads(written.with_suffix('.json').read_text())
  assert result['problems'] == 5 and result['logit_scales'] == list(SCALES)
  exact = {
      'linear': set(result['estimators']) - {'topk'},
      'quad': {'reinforce', 'reinforce_baseline', 'reinmax', 'v1_pure', 'v2_pure', 'v2_star_pure'},
      'cubic': {'reinforce', 'reinforce_baseline', 'v2_pure', 'v2_star_pure'},
      'tanh': {'reinforce', 'reinforce_baseline'},
  }
  for kind, names in exact.items():
    for e in EXPERTS:
      rows = result['results'][kind][str(e)]
      unbiased = {name for name, row in rows.items() if not any(row['relative_bias'])}
      assert unbiased == names, (kind, e)
      assert all(len(row[q]) == len(SCALES) for row in rows.values() for q in row)
      constant = {name for name, row in rows.items() if not any(row['relative_variance'])}
      # f' of a linear loss is the same whatever is drawn, and that is all straight-through uses.
      linear = {'straight_through'} if kind == 'linear' else set()
      assert constant == {'topk', 'densemixer'} | linear


@pytest.mark.long
def test_the_picture_is_a_png_of_some_size(written):
  content = written.with_suffix('.png').read_bytes()
  assert content[:8] == b'\x89PNG\r\n\x1a\n'
  width, height = (int.from_bytes(content[i : i + 4], 'big') for i in (16, 20))
  assert width > 900 and height > 1200


@pytest.mark.parametrize('flag, message', [
    ('--experts=1', 'experts'), ('--scales=0', 'scales'), ('--out=/dev/null/x', '/dev/null/x'),
])
def test_mistakes_are_one_line(flag, message):
  done = run(flag)
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
  assert message in done.stderr
