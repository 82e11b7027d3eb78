"""experiments.evaluate as a command: what it prints, and what it says to mistakes."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import pytest

from moejax import config as config_lib
from moejax import model
from moejax.data import tokenizer as tokenizer_lib

pytestmark = pytest.mark.once

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
      bigram=flags['train_files'], ablate='true', examples='1', max_batches='1', account='true',
      out=str(out),
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
  counted = result['account']
  assert 0 < counted['nonzeros'] <= counted['parameters']
  assert counted['nonzeros'] == sum(row['nonzeros'] for row in counted['layers'])
  assert counted['forward_peak_bytes'] > counted['resident_bytes'] >= counted['stored_bytes']
  assert result['examples'][0]['pieces'] and result['examples'][0]['fills']


@pytest.mark.long
def test_measures_a_decoder_in_the_same_way(tmp_path):
  (tmp_path / 'words').mkdir()
  for name, seed in (('train', 0), ('test', 1)):
    (tmp_path / f'{name}.txt').write_text(common.speech(seed))
  train = (tmp_path / 'train.txt').read_text()
  tokenizer_lib.train([train], 400, 0).save(tmp_path / 'words')
  config = config_lib.DecoderConfig(
      family='grin', vocab_size=400, d_model=16, d_head=8, d_ff=16, num_heads=2, num_kv_heads=1,
      num_layers=1, max_positions=48, initializer_std=0.5, norm='layer', eos_ids=(1,),
      moe=config_lib.DecoderMoeConfig(num_experts=4, top_k=2, router='sparsemixer_v2'),
  )
  made = model.Model.init(config, jax.random.key(0))
  made.save(tmp_path / 'model', tokenizer_from=tmp_path / 'words')
  done = common.run(
      'evaluate', model=str(tmp_path / 'model'), data=str(tmp_path / 'test.txt'),
      against=str(tmp_path / 'model'), bigram=str(tmp_path / 'train.txt'), ablate='true',
      examples='1', max_batches='1', sample_length='24',
  )
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout)
  assert result['agreement']['top1'] == 1.0 and abs(result['agreement']['kl']) < 1e-6
  assert result['zeroed_experts']['cost'] != 0.0
  assert 0 < result['bigram_content_loss'] < result['content_loss'] <= result['loss'] + 1
  assert list(result['routing']) == ['decoder/layers_0/ffn']
  example = result['examples'][0]
  assert example['pieces'][0]['text'] in (tmp_path / 'test.txt').read_text()
  assert len(example['fills']) == len(example['targets']) == 24


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


@pytest.mark.long
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


@pytest.mark.long(but=('change1-no file matches no_such_text.txt',))
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
