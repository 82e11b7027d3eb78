"""The whole loop as users call it: logs, killed runs, the finished folder, one-line errors."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import flags
from moejax import config as config_lib
from moejax import errors, model
from moejax.data import tokenizer
from moejax.train import loop

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = '''
from moejax import config as c

def get_config():
  return c.Experiment(
      model=c.EncDecConfig(
          vocab_size=320, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1,
          num_decoder_layers=1, dropout_rate=0.1,
          moe=c.EncDecMoeConfig(num_experts=2, encoder_sparse_step=1, decoder_sparse_step=1)),
      data=c.DataConfig(train_files=({train!r},), valid_files=({valid!r},), encoder_length=24,
                        num_sentinels=10),
      optim=c.OptimConfig(warmup_steps=2, learning_rate=0.01),
      mesh=c.MeshConfig(data=1),
      train=c.TrainConfig(steps=40, batch_size=8, log_every=1, eval_every=20, eval_batches=2,
                          checkpoint_every=5, peak_flops_per_second=1e9))
'''


@pytest.fixture
def config(tmp_path):
  rng = np.random.default_rng(0)
  words = ['union', 'state', 'the', 'of', 'people', 'year', 'congress', 'and', 'great', 'law']
  for name in ('train', 'valid'):
    (tmp_path / f'{name}.txt').write_text(' '.join(rng.choice(words, 600)))
  file = tmp_path / 'tiny.py'
  file.write_text(
      CONFIG.format(train=str(tmp_path / 'train.txt'), valid=str(tmp_path / 'valid.txt'))
  )
  return file


def command(config, workdir, *extra):
  return [sys.executable, '-m', 'experiments.train', '--config', str(config),
          '--workdir', str(workdir), *extra]


def environment(cache):
  flags = re.sub(r'--xla_force_host_platform_device_count=\d+', '', os.environ['XLA_FLAGS'])
  return {
      **os.environ,
      'XLA_FLAGS': flags,
      'JAX_COMPILATION_CACHE_DIR': str(cache),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'PYTHONPATH': str(ROOT),
  }


def run(config, workdir, *extra):
  return subprocess.run(
      command(config, workdir, *extra), cwd=ROOT, env=environment(config.parent / 'cache'),
      capture_output=True, text=True,
  )


def last_losses(workdir):
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return {(row['kind'], row['step']): row['loss'] for row in rows}


@pytest.mark.long
def test_killed_at_a_random_step_ends_in_the_same_model(config, tmp_path):
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  done = run(config, whole)
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout)['step'] == 40

  # Step 10 begins its checkpoint when that of step 5 is on disk: from then on there is one.
  stop_at = int(np.random.default_rng(int(time.time())).integers(11, 36))
  process = subprocess.Popen(
      command(config, broken), cwd=ROOT, env=environment(tmp_path / 'cache'),
      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
  )
  log = broken / 'metrics.jsonl'
  while process.poll() is None:
    if log.exists() and log.read_text().count('"kind": "train"') >= stop_at:
      process.send_signal(signal.SIGKILL)
      break
    time.sleep(0.002)
  assert process.wait() == -signal.SIGKILL, 'the run ended before it could be killed'
  assert not (broken / 'model').exists()

  again = run(config, broken)
  assert again.returncode == 0, again.stderr
  assert re.search(r'resumed at step \d+', again.stderr), f'killed at {stop_at}: {again.stderr}'
  want, got = last_losses(whole), last_losses(broken)
  assert got == want and len(want) == 42
  one, two = (model.Model.load(folder / 'model') for folder in (whole, broken))
  jax.tree.map(np.testing.assert_array_equal, one.params, two.params)


def test_a_finished_run_leaves_everything_behind(config, tmp_path):
  experiment = flags.load_config(
      str(config), ['train.steps=6', 'train.eval_every=3', 'train.save_dtype=bfloat16']
  )
  seen = []
  workdir = tmp_path / 'run'
  result = loop.run(experiment, workdir, hooks=[seen.append])
  assert result['finished'] and result['step'] == 6
  names = {(record.kind, record.step) for record in seen}
  assert names == {*(('train', i) for i in range(1, 7)), ('eval', 3), ('eval', 6)}
  wanted = {
      'loss', 'cross_entropy', 'load_balance_loss', 'z_loss', 'load_entropy', 'dropped',
      'grad_norm', 'param_norm', 'tokens_per_second', 'model_flops_utilisation', 'learning_rate',
      'load/encoder/layers_0/ffn', 'load_entropy/decoder/layers_0/ffn',
  }
  assert wanted <= set(next(r for r in seen if r.step == 4).metrics)
  saved = model.Model.load(workdir / 'model')
  assert saved.config == experiment.model
  assert {str(x.dtype) for x in jax.tree.leaves(saved.params)} == {'bfloat16'}
  assert tokenizer.load(workdir / 'model').vocab_size == 320
  assert config_lib.from_json(
      config_lib.Experiment, json.loads((workdir / 'config.json').read_text())
  ) == experiment

  # It goes on from that folder, and a finished run that is started again trains no further.
  more = flags.load_config(
      str(config), ['train.steps=3', f'init_from={workdir / "model"}', 'data.valid_files=[]']
  )
  first = []
  loop.run(more, tmp_path / 'more', hooks=[first.append])
  assert first[0].metrics['loss'] < seen[0].metrics['loss']
  idle = []
  assert loop.run(experiment, workdir, hooks=[idle.append])['step'] == 6 and not idle


@pytest.mark.long
def test_overfits_a_tiny_text(config, tmp_path):
  (tmp_path / 'train.txt').write_text('we the people of the united states in order to form ' * 3)
  experiment = flags.load_config(
      str(config),
      ['train.steps=150', 'train.eval_every=0', 'train.checkpoint_every=0', 'data.valid_files=[]',
       'model.dropout_rate=0.0', 'train.log_every=10', 'model.d_model=32', 'model.d_ff=64'],
  )
  seen = []
  loop.run(experiment, tmp_path / 'run', hooks=[seen.append])
  assert seen[0].metrics['cross_entropy'] > 3.0
  assert seen[-1].metrics['cross_entropy'] < 0.7
  assert seen[-1].metrics['accuracy'] > 0.8


@pytest.mark.long
def test_time_is_up(config, tmp_path):
  experiment = flags.load_config(
      str(config), ['train.max_seconds=0.001', 'data.valid_files=[]']
  )
  result = loop.run(experiment, tmp_path / 'run', hooks=[])
  assert not result['finished'] and result['step'] == 1
  assert loop.run(experiment, tmp_path / 'run', hooks=[])['step'] == 2


@pytest.mark.parametrize(
    'setting, message',
    [
        ('train.stepz=3', r"unknown field 'train\.stepz' \(did you mean 'steps'\?\)"),
        ('train.accumulate=3', r'train\.batch_size = 8 must be a multiple of train\.accumulate'),
        ('train.compute_dtype=float16', r"train\.compute_dtype = 'float16'"),
        ('train.save_dtype=int8', r"train\.save_dtype = 'int8'"),
        ('data.train_files=["nowhere.txt"]', r'data\.train_files: no file matches nowhere\.txt'),
        ('data.num_sentinels=0', r'data\.num_sentinels = 0: a sample of'),
        ('optim.schedule=cosin', r"did you mean 'cosine'"),
        ('mesh.data=64', r'needs 64 devices, found'),
        ('init_from=nowhere', r'nowhere'),
    ],
)
def test_mistakes_in_the_config_are_named(config, tmp_path, setting, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    loop.run(flags.load_config(str(config), [setting]), tmp_path / 'run', hooks=[])
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'run' / 'model').exists()


def test_another_tokenizer_is_refused(config, tmp_path):
  tokenizer.train(['x'], 300, 10).save(tmp_path)
  experiment = flags.load_config(str(config), [f'data.tokenizer={tmp_path}'])
  with pytest.raises(errors.UserError, match=r'tokenizer has 300 ids, model\.vocab_size is 320'):
    loop.run(experiment, tmp_path / 'run', hooks=[])


@pytest.mark.long(but=("extra0-unknown field 'train.stepz' (did you mean 'steps'?)",))
@pytest.mark.parametrize('extra, said', [
    (['--set', 'train.stepz=3'], "unknown field 'train.stepz' (did you mean 'steps'?)"),
    (['--config', 'configs/qmoe.py'], 'configs/qmoe.py returns a Quantize, no training run; try '),
    (['--distributed', '--processes', '2', '--process', '2'], 'process 2 of 2: the first one is 0'),
    (['--distributed', '--processes', '2', '--process', '1'], '--distributed: coordinator_address'),
])
def test_a_mistake_ends_in_one_line_and_exit_code_2(extra, said, config, tmp_path):
  done = run(config, tmp_path / 'run', *extra)
  assert done.returncode == 2, done.stderr
  lines = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
  assert len(lines) == 1 and lines[0].startswith(f'error: {said}')
  assert 'Traceback' not in done.stderr and not (tmp_path / 'run').exists()


def test_a_workdir_that_cannot_be_written_is_named(config, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.UserError, match=r'cannot write .*file/run'):
    loop.prepare_workdir(tmp_path / 'file' / 'run')


def test_a_folder_that_is_no_model_is_noticed_before_training(config, tmp_path):
  (tmp_path / 'run' / 'model').mkdir(parents=True)
  (tmp_path / 'run' / 'model' / 'thesis.tex').write_text('years of work')
  with pytest.raises(errors.UserError, match=r"run/model holds 'thesis\.tex'"):
    loop.run(flags.load_config(str(config)), tmp_path / 'run', hooks=[])
  assert [p.name for p in (tmp_path / 'run').iterdir()] == ['model']


@pytest.mark.long(but=('2000-tokenizer.json',))
@pytest.mark.parametrize('room, named', [(2000, 'tokenizer.json'), (20_000, 'checkpoints')])
def test_a_full_disk_ends_in_one_line_and_exit_code_2(config, tmp_path, room, named):
  """No file can grow past so many bytes: first the tokenizer does not fit, then a checkpoint."""
  arguments = command(config, tmp_path / 'run', '--set', 'train.steps=6')
  limited = [
      sys.executable, '-c',
      f'import os, resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({room}, {room})); '
      f'os.execv({sys.executable!r}, {arguments})',
  ]
  no_cache = {**environment(tmp_path / 'cache'), 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
  done = subprocess.run(limited, cwd=ROOT, env=no_cache, capture_output=True, text=True)
  assert done.returncode == 2, done.stderr
  said = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
  assert len(said) == 1 and f'cannot write {tmp_path / "run" / named}: ' in said[0]
  assert done.stderr.splitlines()[-1] == said[0] and 'Traceback' not in done.stderr
  left = {p.name for p in (tmp_path / 'run').rglob('*')}
  assert 'model' not in left and not [name for name in left if 'partial' in name or 'tmp' in name]
