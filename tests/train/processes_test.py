"""Several processes over loopback: one run, a kill in the middle, and another number of them."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import flags
from experiments import processes as processes_lib
from moejax import model
from moejax.errors import UserError
from moejax.train import loop

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 8
CONFIG = '''
from moejax.config import *

def get_config():
  return Experiment(
      model=DecoderConfig(
          family='grin', vocab_size=300, d_model=16, d_head=8, d_ff=16, num_heads=2,
          num_kv_heads=2, num_layers=2, norm='layer', eos_ids=(1,),
          moe=DecoderMoeConfig(num_experts=4, top_k=2, router='sparsemixer_v2', balance='global'),
      ),
      data=DataConfig(train_files=({text!r},), sequence_length=32),
      optim=OptimConfig(warmup_steps=2, learning_rate=3e-3),
      train=TrainConfig(
          steps={steps}, batch_size=8, log_every=1, checkpoint_every=2, scan_layers=True
      ),
  )
'''


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp('config')
  words = np.random.default_rng(0).choice(['we', 'the', 'people', 'of', 'states', 'union'], 4000)
  (folder / 'text.txt').write_text(' '.join(words))
  path = folder / 'tiny.py'
  path.write_text(CONFIG.format(text=str(folder / 'text.txt'), steps=STEPS))
  return path


def free_port():
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    return probe.getsockname()[1]


def command(config, workdir, *extra):
  return [sys.executable, '-m', 'experiments.train', '--config', str(config),
          '--workdir', str(workdir), *extra]


def environment(**changes):
  flags = re.sub(r'--xla_force_host_platform_device_count=\d+', '', os.environ['XLA_FLAGS'])
  return {**os.environ, 'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT), **changes}


def start(config, workdir, count, by='jax'):
  """Processes of one run; they find one another by their environment, as under `by`."""
  port, started = free_port(), []
  for i in range(count):
    if by == 'slurm':
      job = port - (65535 - 2**12 + 1)  # JAX derives the port from the job's number
      own = {'SLURM_JOB_ID': str(job % 2**12), 'SLURM_STEP_NODELIST': 'localhost',
             'SLURM_NTASKS': str(count), 'SLURM_PROCID': str(i), 'SLURM_LOCALID': str(i)}
    else:
      own = {'JAX_COORDINATOR_ADDRESS': f'localhost:{port}', 'JAX_NUM_PROCESSES': str(count),
             'JAX_PROCESS_ID': str(i)}
    started.append(subprocess.Popen(
        command(config, workdir, '--set', f'mesh.data={count}', '--heartbeat_seconds', '10'),
        cwd=ROOT, env=environment(**own), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ))
  return started


def losses(workdir):
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  steps = [row['step'] for row in rows if row['kind'] == 'train']
  assert steps == sorted(set(steps))
  return [row['loss'] for row in rows if row['kind'] == 'train']


def finish(started):
  for process in started:
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr


@pytest.mark.long
def test_four_train_one_dies_and_two_go_on(config, tmp_path):
  """Each process makes its own rows of every batch, so nothing is lost or seen twice."""
  workdir = tmp_path / 'run'
  started = start(config, workdir, 4)
  checkpoints = workdir / 'checkpoints'
  while not any(p.name.isdigit() and int(p.name) >= 4 for p in checkpoints.glob('*')):
    assert all(process.poll() is None for process in started), started[0].communicate()[1]
    time.sleep(0.02)
  started[2].send_signal(signal.SIGKILL)
  began = time.monotonic()
  for process in started:
    process.communicate(timeout=120)
    assert process.returncode != 0
  assert time.monotonic() - began < 90
  assert not (workdir / 'model').exists()

  again = start(config, workdir, 2, by='slurm')
  finish(again)
  seen = []
  loop.run(flags.load_config(str(config)), tmp_path / 'one', hooks=[seen.append])
  got, want = losses(workdir), [record.metrics['loss'] for record in seen]
  assert len(got) == len(want) == STEPS
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert model.Model.load(workdir / 'model').config.moe.num_experts == 4


def test_where_a_run_has_several_processes():
  step = {'SLURM_STEP_NODELIST': 'n[1-2]', 'SLURM_PROCID': '0'}
  assert processes_lib.several_by_slurm({**step, 'SLURM_NTASKS': '2'})
  assert not processes_lib.several_by_slurm({**step, 'SLURM_NTASKS': '1'})
  assert not processes_lib.several_by_slurm({'SLURM_NTASKS': '2'})  # a batch script, not srun
  with pytest.raises(UserError, match="SLURM_NTASKS='two' in the environment: a whole number"):
    processes_lib.several_by_slurm({**step, 'SLURM_NTASKS': 'two'})


@pytest.mark.parametrize('script', sorted((ROOT / 'experiments' / 'launch').glob('*.sh')),
                         ids=lambda p: p.name)
def test_launchers_are_valid_shell(script):
  subprocess.run(['bash', '-n', script], check=True)
  assert '-m experiments.train' in script.read_text()
