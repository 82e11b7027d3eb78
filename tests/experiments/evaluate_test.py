"""experiments.evaluate as a command: what it prints, and what it says to mistakes."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

_SPEC = importlib.util.spec_from_file_location(
    'demo_common', pathlib.Path(__file__).with_name('demo_common.py')
)
common = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(common)


@pytest.fixture(scope='module')
def flags(tmp_path_factory):
  return common.make_checkpoint(tmp_path_factory.mktemp('evaluate'))


def test_prints_json_of_everything_asked(flags, tmp_path):
  out = tmp_path / 'result.json'
  done = common.run(
      'evaluate', model=flags['checkpoint'], data=flags['test_files'], against=flags['checkpoint'],
      bigram=flags['train_files'], ablate='true', examples='1', max_batches='1', out=str(out),
  )
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout)
  assert result == common.read(out)
  assert result['agreement']['top1'] == 1.0
  assert result['zeroed_experts']['cost'] == pytest.approx(
      result['zeroed_experts']['content_loss'] - result['content_loss']
  )
  # Random words of a skewed distribution: the bigram knows the distribution, the model nothing.
  assert 0 < result['bigram_content_loss'] < result['content_loss']
  assert set(result['routing']) == {'encoder/layers_0/ffn', 'decoder/layers_0/ffn'}
  assert result['examples'][0]['pieces'] and result['examples'][0]['fills']


@pytest.mark.parametrize('folder, message', [
    ('', 'is a folder: name a file'), ('checkpoint/config.json/x', 'a part of this path is a file'),
])
def test_a_result_that_cannot_be_written_is_noticed_first(flags, tmp_path, folder, message):
  out = pathlib.Path(flags['checkpoint']).parent / folder
  done = common.run(
      'evaluate', model=flags['checkpoint'], data=flags['test_files'], out=str(out)
  )
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
  assert str(out) in done.stderr and message in done.stderr


def test_a_full_disk_behind_the_output_is_one_line(flags):
  command = [
      sys.executable, '-m', 'experiments.evaluate', '--model', flags['checkpoint'],
      '--data', flags['test_files'], '--max_batches', '1',
  ]
  with open('/dev/full', 'w') as full:
    done = subprocess.run(
        command, cwd=common.ROOT, env=common.environment(), stdout=full, stderr=subprocess.PIPE,
        text=True, check=False,
    )
  assert done.returncode == 2
  (said,) = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
  assert said.startswith('error: cannot write the output: the disk is full')
  assert 'Traceback' not in done.stderr and 'Exception ignored' not in done.stderr


@pytest.mark.parametrize('change, message', [
    ({'model': 'no/such/folder'}, 'no/such/folder does not exist'),
    ({'data': 'no_such_text.txt'}, 'no file matches no_such_text.txt'),
    ({'modle': 'x'}, "unknown flag --modle (did you mean 'model'?)"),
])
def test_mistakes_are_one_line(flags, change, message):
  given = {'model': flags['checkpoint'], 'data': flags['test_files'], **change}
  done = common.run('evaluate', **given)
  assert done.returncode == 2
  assert done.stderr.strip().splitlines()[-1].startswith('error: ')
  assert message in done.stderr and 'Traceback' not in done.stderr
