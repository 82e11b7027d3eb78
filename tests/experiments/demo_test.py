"""The demo from end to end on a stand-in checkpoint: killed, run again, then all from the cache."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments import demo_steps
from moejax.errors import UserError

_SPEC = importlib.util.spec_from_file_location(
    'demo_common', pathlib.Path(__file__).with_name('demo_common.py')
)
common = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(common)

ROWS = ['bf16', 'rtn', 'qmoe', 'refit', 'search', 'two_bit']


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """The flags, the workdir and the output of a demo that was killed once on the way."""
  folder = tmp_path_factory.mktemp('demo')
  flags = {**common.make_checkpoint(folder), 'workdir': str(folder / 'run')}
  command = [sys.executable, '-m', 'experiments.demo', *(f'--{k}={v}' for k, v in flags.items())]
  with open(folder / 'killed.log', 'w') as log:
    process = subprocess.Popen(
        command, cwd=common.ROOT, env=common.environment(), stdout=log, stderr=log,
        start_new_session=True,
    )
    wanted = folder / 'run' / 'steps' / 'compress_rtn.json'
    while process.poll() is None and not wanted.exists():
      time.sleep(0.05)
    assert process.poll() is None, (folder / 'killed.log').read_text()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
  before = {p.name: p.read_bytes() for p in (folder / 'run' / 'steps').glob('*.json')}
  done = common.run('demo', **flags)
  assert done.returncode == 0, done.stderr
  return flags, folder / 'run', done, before


@pytest.mark.long
def test_it_compares_all_rows(finished):
  _, workdir, done, _ = finished
  values = common.read(workdir / 'report.json')
  assert [v['key'] for v in values['variants']] == ROWS
  by_key = {v['key']: v for v in values['variants']}
  bits = {key: v['after']['expert_bits_per_weight'] for key, v in by_key.items()}
  assert bits['bf16'] == 16.0
  assert all(bits[key] < 16 for key in ROWS[1:]) and bits['two_bit'] > bits['qmoe']
  for key in ROWS[1:]:
    assert by_key[key]['after']['stored_bytes'] < by_key['bf16']['after']['stored_bytes']
    assert 0 <= by_key[key]['evaluation']['agreement']['top1'] <= 1
    assert len(by_key[key]['layers']) == 2 * 2 * 4  # stacks, wi and wo, experts
  error = lambda key: sum(row['relative_output_error'] for row in by_key[key]['layers'])
  assert error('refit') < error('qmoe') < error('rtn')
  assert {'source', 'steps', 'before', 'after', 'layers'} <= set(values)
  assert values['baselines']['bigram_content_loss'] > 0
  for v in values['variants']:
    assert v['name'] in done.stdout
    assert f'{v["evaluation"]["content_loss"]:.3f}' in done.stdout
  assert (workdir / 'report.png').read_bytes().startswith(b'\x89PNG')
  page = (workdir / 'report.html').read_text()
  assert 'QMoE searched grid' in page and 'http' not in page


@pytest.mark.long
def test_what_was_done_before_the_kill_was_kept(finished):
  _, workdir, done, before = finished
  assert {'train.json', 'compress_rtn.json', 'evaluate_bf16.json'} <= set(before)
  for name, content in before.items():
    assert (workdir / 'steps' / name).read_bytes() == content
  assert done.stderr.count('kept from last time') == len(before)


@pytest.mark.long
def test_a_rerun_takes_everything_from_the_cache(finished):
  flags, workdir, done, _ = finished
  check_rerun(flags, workdir, done, ROWS)


@pytest.mark.once
def test_one_row_alone(tmp_path):
  flags = {**common.make_checkpoint(tmp_path), 'workdir': str(tmp_path / 'run'), 'rows': 'rtn'}
  done = common.run('demo', **flags)
  assert done.returncode == 0, done.stderr
  values = common.read(tmp_path / 'run' / 'report.json')
  assert [v['key'] for v in values['variants']] == ['bf16', 'rtn'] and values['headline'] == 'rtn'
  assert 'RTN ternary' in done.stdout
  assert 'RTN ternary' in (tmp_path / 'run' / 'report.html').read_text()


def test_a_row_that_is_not_there_is_one_line():
  with pytest.raises(UserError, match=r"no row 'rnt': bf16, rtn, .*did you mean 'rtn'"):
    demo_steps.recipes(('qmoe', 'rnt'))


def check_rerun(flags, workdir, done, rows):
  models = {p: p.stat().st_mtime_ns for p in workdir.rglob('*.safetensors')}
  again = common.run('demo', **flags)
  assert again.returncode == 0, again.stderr
  assert again.stderr.count('kept from last time') == 2 * len(rows) + 1
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob('*.safetensors')} == models
  table = lambda text: [line for line in text.splitlines() if 'QMoE' in line]
  assert table(again.stdout) == table(done.stdout) and table(done.stdout)


def test_a_missing_checkpoint_is_one_line(tmp_path):
  done = common.run('demo', checkpoint=str(tmp_path / 'nothing'), workdir=str(tmp_path / 'run'))
  assert done.returncode == 2
  lines = done.stderr.strip().splitlines()
  assert lines[-1].startswith('error: no model folder at') and 'Traceback' not in done.stderr
  assert not (tmp_path / 'run').exists()


@pytest.mark.long
def test_a_full_disk_is_one_line(tmp_path):
  flags = {**common.make_checkpoint(tmp_path), 'workdir': str(tmp_path / 'run')}
  done = common.run('demo', room=1, **flags)
  assert done.returncode == 2
  (said,) = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
  file = tmp_path / 'run' / 'steps' / 'evaluate_checkpoint.json'
  assert said.startswith(f'error: cannot write {file}: ') and 'Traceback' not in done.stderr
  left = [p for p in (tmp_path / 'run').rglob('*') if p.is_file()]
  assert {p.parent.name for p in left} <= {'jax_cache'}  # JAX looks past what it cannot read


def test_a_folder_of_somebody_else_is_not_trained_into(tmp_path):
  flags = common.make_checkpoint(tmp_path)
  (tmp_path / 'run' / 'train').mkdir(parents=True)
  (tmp_path / 'run' / 'train' / 'thesis.tex').write_text('years of work')
  settings = demo_steps.Settings(
      checkpoint=pathlib.Path(flags['checkpoint']), workdir=tmp_path / 'run'
  )
  with pytest.raises(UserError, match=r'run/train is not of the demo: name a new folder'):
    demo_steps.train(settings)
  assert (tmp_path / 'run' / 'train' / 'thesis.tex').read_text() == 'years of work'


def test_memory_keeps_a_result_for_its_inputs_only(tmp_path):
  memory, made = demo_steps.Memory(tmp_path / 'steps'), tmp_path / 'made'
  calls = []

  def work():
    calls.append(1)
    made.write_text('x')
    return {'answer': len(calls)}

  assert memory.step('a', {'x': 1}, made, work) == ({'answer': 1}, False)
  assert memory.step('a', {'x': 1}, made, work) == ({'answer': 1}, True)
  assert memory.step('a', {'x': 2}, made, work) == ({'answer': 2}, False)
  made.unlink()
  assert memory.step('a', {'x': 2}, made, work) == ({'answer': 3}, False)
  (tmp_path / 'steps' / 'a.json').write_text('{"key": "cut o')
  assert memory.step('a', {'x': 2}, made, work) == ({'answer': 4}, False)


def test_stopwatch_goes_on_after_a_restart(tmp_path):
  file = tmp_path / 'elapsed.json'
  file.write_text(json.dumps({'seconds': 100.0}))
  assert not demo_steps.Stopwatch(file, 100.5).should_stop()
  assert demo_steps.Stopwatch(file, 99.0).should_stop()


def test_sources_are_fingerprinted_by_content(tmp_path):
  file = tmp_path / 'a.txt'
  file.write_text('one')
  first = demo_steps.text_fingerprint((str(file), 'x/*.txt'))
  file.write_text('two')
  assert demo_steps.text_fingerprint((str(file), 'x/*.txt')) != first


def test_the_searched_recipe_holds_one_bit_in_all():
  search = next(r for r in demo_steps.recipes() if r.key == demo_steps.HEADLINE)
  assert search.transform.matrix.budget == 1.0
  with pytest.raises(UserError):
    demo_steps.quantize('nonsense')
