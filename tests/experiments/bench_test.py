"""experiments.bench: every worker runs, peers do the same work, what is missing is said."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import (
  experts_jax,
  gptq_jax,
  gptq_problem,
  kernels_gpu,
  suites,
  tables,
  timing,
)
from moejax import errors
from moejax.compress import gptq_core

pytestmark = pytest.mark.once


def bench(*flags: str) -> subprocess.CompletedProcess:
  return subprocess.run(
      [sys.executable, '-m', 'experiments.bench', *flags], cwd=suites.ROOT, capture_output=True,
      text=True, check=False,
  )


@pytest.fixture(scope='module')
def quick(tmp_path_factory):
  """One round of everything at tiny sizes: (process, JSON, markdown)."""
  folder = tmp_path_factory.mktemp('bench')
  out, page = folder / 'deep' / 'bench.json', folder / 'BENCHMARKS.md'
  page.write_text(f'old\n{tables.MARKER}\n\nwritten by hand\n')
  done = bench('--quick', '--rounds', '1', '--out', str(out), '--markdown', str(page))
  assert done.returncode == 0, done.stderr
  return done, json.loads(out.read_text()), page.read_text()


@pytest.mark.long
def test_json_says_where_and_how(quick):
  _, result, _ = quick
  assert result['machine']['memory_gb'] > 0 and result['machine']['cpu']
  settings = result['settings']
  assert settings['quick'] and settings['rounds'] == 1
  assert settings['environment']['OMP_NUM_THREADS'] == str(settings['threads']) == '2'
  for worker in result['workers'].values():
    assert worker['cpus'] == len(settings['cpus']) or not settings['cpus']
    assert 'jax' in worker['versions'] or 'torch' in worker['versions']
  for m in result['measurements']:
    assert m['min'] <= m['median'] <= m['max'] and m['samples']


@pytest.mark.long
def test_every_part_has_its_rows(quick):
  _, result, _ = quick
  rows = result['comparisons']
  parts = {'forward', 'gptq', 'experts', 'codec'}
  assert {r['part'] for r in rows} == parts
  metrics = {(r['part'], r['metric']) for r in rows}
  assert metrics >= {target for target in tables.TARGETS if target[0] in parts}
  experts = [r for r in rows if r['part'] == 'experts']
  assert len(experts) == 2 * 2 * len(experts_jax.SMALL)
  assert sum(r['part'] == 'codec' for r in rows) == 4 + 2 * 3
  for r in rows:
    assert r['verdict'] != 'not the same work'
    if r['part'] in ('experts', 'codec'):
      assert r['ratio'] > 0 and r['ours']['value'] > 0 and r['peer']['value'] > 0


@pytest.mark.torch
@pytest.mark.long
def test_torch_peers_are_measured_and_did_the_same(quick):
  _, result, _ = quick
  assert result['skipped'] == {}
  targets = [r for r in result['comparisons'] if r['target'] is not None]
  assert len(targets) == 1 + 2 * 2
  for r in targets:
    assert r['verdict'] == ('met' if r['ratio'] >= r['target'] else 'missed')
  forward = [m for m in result['measurements'] if m['part'] == 'forward']
  assert {m['work']['tokens_through_experts'] for m in forward} == {2 * 2 * 16}
  assert next(m for m in forward if not m['ours'])['threads'] == len(result['settings']['cpus'])


@pytest.mark.long
@pytest.mark.torch
def test_the_suite_of_merging(tmp_path):
  out = tmp_path / 'merge.json'
  done = bench('--suite', 'merge', '--quick', '--rounds', '1', '--out', str(out))
  assert done.returncode == 0, done.stderr
  rows = json.loads(out.read_text())['comparisons']
  assert {r['part'] for r in rows} == {'merge', 'fewer'}
  compared = [r for r in rows if r['peer'] is not None]
  assert {r['metric'] for r in compared} >= {
      'usage and router similarity', 'statistics for REAP', 'forward pass'
  }
  assert not [r for r in compared if r['verdict'] == 'not the same work']


@pytest.mark.long
def test_the_moefy_suite_runs(tmp_path):
  out = tmp_path / 'moefy.json'
  done = bench('--suite', 'moefy', '--quick', '--rounds', '1', '--out', str(out))
  assert done.returncode == 0, done.stderr
  result = json.loads(out.read_text())
  assert {r['part'] for r in result['comparisons']} == {'neurons', 'clusters'}
  rows = [r for r in result['comparisons'] if 'token' in r['metric'] and r['peer']]
  assert all(r['ratio'] > 0 for r in rows)
  assert [r['metric'] for r in rows] == [
      '1 token', '40 tokens', '40 tokens', '40 tokens at 50 %', '40 tokens at 100 %',
      '512 tokens in, 64 out, forward', '32 tokens out after 16 in, greedy',
  ]


@pytest.mark.long
def test_the_suite_of_kernels(tmp_path):
  out = tmp_path / 'kernels.json'
  done = bench('--suite', 'kernels', '--quick', '--rounds', '1', '--out', str(out))
  assert done.returncode == 0, done.stderr
  rows = json.loads(out.read_text())['comparisons']
  assert {r['part'] for r in rows} == {'products', 'schedules'}
  assert all(r['ratio'] and r['ratio'] > 0 for r in rows)
  products = [r for r in rows if r['part'] == 'products']
  assert all(r['target'] for r in products) and len(products) == 4 * 7


@pytest.mark.long
def test_the_suite_of_switch_c(tmp_path):
  out = tmp_path / 'c2048.json'
  done = bench('--suite', 'c2048', '--quick', '--rounds', '1', '--out', str(out))
  assert done.returncode == 0, done.stderr
  rows = {(r['case'], r['metric']): r for r in json.loads(out.read_text())['comparisons']}
  # Matrices of 96 and 160 inputs carry more beside their codes than those of the model.
  stored = rows['the whole model', 'stored']
  assert stored['ours']['value'] == pytest.approx(
      rows['all experts', 'bits a weight']['ours']['value'] * 1.5703e12 / 8e9, rel=0.05
  )
  assert [r['unit'] for r in rows.values() if 'on CPU' in r['case']] == ['s', 'tokens/s']


@pytest.mark.long
def test_tables_of_terminal_and_page_are_those_of_the_json(quick):
  done, result, page = quick
  assert done.stdout.strip() == tables.text(result)
  assert page.endswith('\n\nwritten by hand\n') and page.startswith('# Benchmarks')
  lines = page.splitlines()
  for row in result['comparisons']:
    assert '| ' + ' | '.join(tables.cells(row)) + ' |' in lines


@pytest.mark.long
def test_render_measures_nothing_and_keeps_what_is_written_by_hand(quick, tmp_path):
  _, result, page = quick
  saved, copy = tmp_path / 'bench.json', tmp_path / 'page.md'
  saved.write_text(json.dumps(result))
  done = bench('--render', str(saved), '--markdown', str(copy))
  assert done.returncode == 0 and done.stdout.strip() == tables.text(result)
  assert copy.read_text().partition(tables.MARKER)[0] == page.partition(tables.MARKER)[0]
  assert 'Misses' in tables.by_hand(copy)
  copy.write_text('all of it mine')
  with pytest.raises(errors.UserError, match='has no line'):
    tables.by_hand(copy)


@pytest.mark.parametrize('flags, message', [
    (['--suite', 'foundaton'], "no suite 'foundaton' (did you mean 'foundation'?)"),
    (['--rounds', '0'], 'rounds'),
    (['--python', '/no/python'], '--python /no/python is no Python that runs'),
    (['--out', 'moejax'], 'moejax is a folder'),
    (['--render', 'no/such.json'], 'no/such.json'),
])
def test_mistakes_are_one_line(flags, message):
  done = bench(*flags)
  assert done.returncode == 2
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
  assert message in done.stderr


def _measured(part, metric, value, *, ours, unit='s', who='x', work=None):
  row = timing.row('case', metric, who, [value], unit, ours=ours, work=work)
  return tables.merge([(part, row)])[0]


@pytest.mark.parametrize('peer_s, ratio, verdict', [(2.6, 1.3, 'met'), (2.58, 1.29, 'missed')])
def test_verdict_of_a_target(peer_s, ratio, verdict):
  rows = tables.compare([
      _measured('forward', 'forward pass', 2.0, ours=True),
      _measured('forward', 'forward pass', peer_s, ours=False),
  ], {})
  assert len(rows) == 1 and rows[0]['ratio'] == pytest.approx(ratio)
  assert rows[0]['verdict'] == verdict


def test_speeds_compare_the_other_way_round():
  rows = tables.compare([
      _measured('codec', 'encode', 3e6, ours=True, unit='weights/s'),
      _measured('codec', 'encode', 2e6, ours=False, unit='weights/s'),
  ], {})
  assert rows[0]['ratio'] == pytest.approx(1.5)


def test_a_missing_peer_is_not_measured_and_different_work_is_said():
  ours = _measured('gptq', 'in total', 1.0, ours=True, work={'zero_share': 0.88})
  peer = _measured('gptq', 'in total', 9.0, ours=False, work={'zero_share': 0.5})
  alone = tables.compare([ours], {'gptq': 'gptq_torch: no Python with torch was found'})
  assert [(r['verdict'], r['ratio'], r['target']) for r in alone] == [('not measured', None, 1.0)]
  assert 'not measured' in tables.cells(alone[0])
  assert tables.compare([ours, peer], {})[0]['verdict'] == 'not the same work'


def test_rounds_are_pooled():
  row = lambda s: ('gptq', timing.row('case', 'in total', 'x', s, ours=True))
  merged = tables.merge([row([3.0, 1.0]), row([2.0])])
  assert len(merged) == 1
  assert (merged[0]['median'], merged[0]['min'], merged[0]['max']) == (2.0, 1.0, 3.0)


def test_newest_interpreter_is_taken_and_a_missing_one_named():
  found = {'old': {'jax': '0.9.10', 'jaxlib': '1', 'flax': '1'},
           'new': {'jax': '0.10.2', 'jaxlib': '1', 'flax': '1'}, 'bare': {'jax': '0.12.0'}}
  ours, peer = suites.SUITES['foundation'][:2]
  assert suites.choose(ours, found) == ('new', '')
  python, why = suites.choose(peer, found)
  assert python is None
  assert why == 'no Python with torch and transformers was found (looked in 3)'


def test_failed_worker_gives_its_last_line():
  worker = suites.Worker(part='x', module='no_such_worker', needs=(), seconds=1)
  result, why = suites.run_worker(worker, sys.executable, True)
  assert result is None
  assert why.startswith('no_such_worker failed: ') and 'No module named' in why


@pytest.mark.parametrize('allowed, siblings, cpus', [
    ([3, 0, 1, 2], {}, [0, 1]),
    ([0, 1, 2, 3], {0: '0-1', 1: '0-1', 2: '2-3', 3: '2-3'}, [0, 2]),
    ([4, 5], {4: '4-5', 5: '4-5'}, [4, 5]),
    ([7], {}, [7]),
])
def test_cpus_of_different_cores(allowed, siblings, cpus):
  assert suites.pick_cpus(allowed, siblings) == cpus


def test_functions_are_timed_in_turn_after_the_warm_up():
  calls = []
  fns = {'a': lambda: calls.append('a'), 'b': lambda: calls.append('b')}
  samples = timing.measure(fns, repeats=3, warmup=1)
  assert calls == ['a', 'b'] * 4
  assert [len(s) for s in samples.values()] == [3, 3]
  assert len(timing.measure(fns, repeats=9, warmup=0, budget_s=0.0)['a']) == 1


@pytest.fixture(scope='module', params=gptq_problem.SMALL)
def gptq_case(request):
  w, h = gptq_problem.problem(2, *request.param)
  return w, h, gptq_core.gptq(jnp.asarray(np.swapaxes(w, 1, 2)), jnp.asarray(h), 'ternary')


def test_timed_parts_are_those_of_gptq(gptq_case):
  w, h, whole = gptq_case
  w_edf = jnp.asarray(np.swapaxes(w, 1, 2))
  symbols, values, error = gptq_jax.sweep(w_edf, gptq_jax.factor(jnp.asarray(h)))
  np.testing.assert_array_equal(symbols, whole.symbols)
  np.testing.assert_array_equal(values, whole.values)
  np.testing.assert_array_equal(error, whole.damped_error)


@pytest.mark.torch
def test_torch_peer_quantizes_to_the_same_weights(gptq_case):
  import torch

  from experiments.bench import gptq_torch
  w, h, whole = gptq_case
  quantized, losses = gptq_torch.sweep(
      torch.from_numpy(w), gptq_torch.factor(torch.from_numpy(h))
  )
  np.testing.assert_array_equal(np.swapaxes(quantized.numpy(), 1, 2), whole.values)
  np.testing.assert_allclose(losses.sum(2), whole.damped_error, rtol=1e-4)


@pytest.mark.parametrize('name', ['dense expansion', 'lax.ragged_dot'])
def test_peers_of_the_expert_loop_compute_the_same(name):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (12, 8))
  params = {'wi': jax.random.normal(keys[1], (5, 8, 16)),
            'wo': jax.random.normal(keys[2], (5, 16, 8))}
  sizes = jnp.array([3, 0, 7, 0, 2])
  np.testing.assert_allclose(
      experts_jax.FORMS[name](params, x, sizes), experts_jax.ours(params, x, sizes), rtol=1e-5,
      atol=1e-5,
  )


def test_results_page_of_the_repository_can_be_regenerated():
  assert tables.by_hand(pathlib.Path(suites.ROOT, 'experiments', 'BENCHMARKS.md'))


@pytest.mark.long
def test_the_decoder_suite_compares_equal_models():
  """transformers and ours load one folder: the same logits, the same greedy tokens."""
  done = bench('--suite', 'decoder', '--quick', '--rounds', '1')
  assert done.returncode == 0, done.stderr
  compared = 'transformers' in done.stdout
  assert 'not the same work' not in done.stdout
  assert compared != ('left out: decoder_torch' in done.stderr)
  if all(importlib.util.find_spec(name) for name in ('torch', 'transformers')):
    assert compared


def test_the_suite_for_a_card_multiplies_right_and_is_left_out_without_one(monkeypatch):
  """On the CPU: XLA's programs and ours, not the kernels."""
  rows = kernels_gpu.main(quick=True)
  timed = {row['metric']: row for row in rows if row['unit'] == 's' and row['ours']}
  formats = (
      'bfloat16, XLA', 'two bits, two levels', 'two bits, one level', 'below one bit', '4 bits',
  )
  for how in ('again', '1 row each', '3 rows each'):
    assert all(0 < timed[f'{how}: {name}']['error'] < 0.01 for name in formats)
    assert timed[f'{how}: below one bit, expanded to two']['bytes'] > 0
  targets = {metric.partition(': ')[2] for part, metric in tables.TARGETS if part == 'card'}
  assert targets <= {*formats, *kernels_gpu.MOSAIC.values()}
  with pytest.raises(ValueError, match='x: off by 100.0%'):
    kernels_gpu.right(jnp.zeros((1, 4)), jnp.ones((1, 3)), np.ones((3, 4)), 'x')
  card = next(w for w in suites.SUITES['kernels'] if w.gpu)
  monkeypatch.setattr(suites.shutil, 'which', lambda name: None)
  able = {'python': dict.fromkeys(card.needs, '1.0')}
  assert suites.choose(card, able) == (None, 'no NVIDIA card is here (nvidia-smi was not found)')
  monkeypatch.setattr(suites.shutil, 'which', lambda name: name)
  assert suites.choose(card, able) == ('python', '')
