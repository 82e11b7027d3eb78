"""experiments.evaluate as a command: what it prints, and what it says to mistakes."""

import importlib.util
import json
import pathlib

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
