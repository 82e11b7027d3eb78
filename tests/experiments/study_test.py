"""The study of routers: records from a run's metrics, the page, the pictures, one real run."""

import json

import pytest

from experiments import flags
from experiments.study import __main__ as command
from experiments.study import page, records, texts
from moejax import errors

pytestmark = pytest.mark.once


def lines(loss, speed, experts):
  rows = [
      {'kind': 'train', 'step': 10, 'loss': 9.0},  # The first compiles and has no speed.
      {'kind': 'train', 'step': 20, 'seconds_per_step': 0.5, 'tokens_per_second': speed},
      {'kind': 'eval', 'step': 20, 'loss': loss + 1},
      {'kind': 'train', 'step': 40, 'seconds_per_step': 0.7, 'tokens_per_second': speed},
      {'kind': 'train', 'step': 60, 'seconds_per_step': 9.0, 'tokens_per_second': speed / 18},
      {'kind': 'eval', 'step': 60, 'loss': loss},
  ]
  if experts:
    health = {'load_entropy': 1.0, 'router_entropy': 0.5, 'dropped': 0.0, 'gates_of_one': 0.1,
              'no_router_gradient': 0.2}
    for row in rows:
      if row['kind'] == 'eval':
        row.update(health, **{'load/decoder/layers_0/ffn': [0.75, 0.25]})
  return [json.dumps(row) for row in rows]


@pytest.fixture
def result():
  runs = {}
  for seed in range(2):
    runs[f'speeches/dense/{seed}'] = records.of_lines(lines(4.0 + seed, 200.0, False))
    runs[f'speeches/grin/{seed}'] = records.of_lines(lines(3.0 + seed, 150.0, True))
  # The machine was slower by half in the second round and by a tenth in the third.
  speeds = [{'dense': 200.0 * f, 'grin': 150.0 * f} for f in (1.0, 0.5, 0.9)]
  return {'machine': {'cpu': 'a CPU', 'cores': 2}, 'jax': '1', 'speeds': speeds, 'runs': runs}


def test_a_record_has_medians_and_the_last_load(result):
  run = result['runs']['speeches/grin/0']
  assert run['tokens_per_second'] == 150.0 and run['tokens_per_step'] == 75
  assert run['evaluations'][-1]['loss'] == 3.0 and run['evaluations'][-1]['router_entropy'] == 0.5
  assert run['load'] == {'decoder/layers_0/ffn': [0.75, 0.25]}
  assert result['runs']['speeches/dense/0']['load'] == {}
  timed = records.of_lines([line for line in lines(3.0, 150.0, True) if 'eval' not in line])
  assert timed['tokens_per_second'] == 150.0 and timed['evaluations'] == []


def test_the_page_says_mean_spread_and_speed_of_dense(result):
  text = page.markdown(result)
  dense, grin = [line for line in text.splitlines() if line.startswith('| dense | ')] + [
      line for line in text.splitlines() if line.startswith('| SparseMixer-v2, top-2')]
  assert '| 4.5000 ± 0.7071 | 180 | 100% |  |' in dense
  assert '| 2 | 60 | 3.5000 ± 0.7071 | 135 | 75% | 0.50 ± 0.00 |' in grin
  assert page.CORPORA['mix'] not in text.split('##', 1)[1]


def test_the_picture_is_drawn(result):
  assert page.draw(result, 'speeches').startswith(b'\x89PNG')
  runs = {name: run for name, run in result['runs'].items() if 'dense' in name}
  assert page.draw({**result, 'runs': runs}, 'speeches').startswith(b'\x89PNG')


def test_every_variant_has_the_same_active_parameters_and_data():
  from moejax import account, model

  active = set()
  for variant in page.LABELS:
    for corpus in page.CORPORA:
      experiment = flags.load_config(f'configs/grin_tiny.py:{variant}-{corpus}')
      params = model.abstract_params(experiment.model)
      gates = sum(4 * 256 * 8 for _ in [0] if experiment.model.moe)  # The routers' own matrices.
      active.add(account.active_parameters(params, experiment.model) - gates)
  assert len(active) == 1
  with pytest.raises(errors.UserError, match=r"no variant 'grin-miks' \(did you mean 'mix'"):
    flags.load_config('configs/grin_tiny.py:grin-miks')


@pytest.mark.long
def test_one_run_of_the_study(tmp_path):
  small = ['model.num_layers=1', 'model.d_model=32', 'model.d_ff=32', 'model.moe.d_ff=16',
           'model.d_head=16', 'model.num_heads=2', 'model.num_kv_heads=1', 'train.steps=4',
           'train.batch_size=2', 'train.eval_every=2', 'train.eval_batches=1', 'train.log_every=1',
           'data.sequence_length=32', 'optim.warmup_steps=1', 'optim.decay_steps=1',
           'model.vocab_size=300', 'mesh.data=1',
           'data.train_files=["experiments/data/sotu.tar.xz::sotu/???1_*.txt"]']
  run = command.train('speeches/grin/0', tmp_path / 'run', small)
  assert [row['step'] for row in run['evaluations']] == [2, 4]
  assert run['evaluations'][0]['router_entropy'] > 0 and run['tokens_per_second'] > 0
  assert sum(run['load']['decoder/layers_0/ffn']) == pytest.approx(1, abs=1e-3)


def test_a_missing_package_manager_is_one_line(tmp_path):
  with pytest.raises(errors.UserError, match='no-such-command is missing'):
    texts.run(['no-such-command'], tmp_path)
  with pytest.raises(errors.UserError, match='ls .*nowhere'):
    texts.run(['ls', 'nowhere'], tmp_path)
