"""Counting operations and collectives, and a small step compiled for TPUs that are not there."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import pytest

from experiments import flags, tpu_compiler
from experiments.pods import flops, hlo, plans, table

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[2]


def count(function, *shapes):
  structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return flops.matmul_flops(jax.make_jaxpr(function)(*structs).jaxpr)


def test_products_count_two_operations_for_each_multiplication():
  assert count(jnp.dot, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
  assert count(lambda a, b: jnp.einsum('bij,bjk->bik', a, b), (4, 3, 5), (4, 5, 7)) == 840


def test_a_scan_counts_as_often_as_it_runs_and_its_gradient_twice_that():
  def f(x, ws):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, ws)[0].sum()

  forward = 6 * 2 * 3 * 5 * 5
  assert count(f, (3, 5), (6, 5, 5)) == forward
  assert count(jax.grad(f, (0, 1)), (3, 5), (6, 5, 5)) == 3 * forward


def test_a_kernel_counts_the_rows_that_are_filled():
  def kernel(x_ref, y_ref):
    y_ref[...] = x_ref[...]

  def call(x):
    cost = pl.CostEstimate(flops=640, transcendentals=0, bytes_accessed=0)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(kernel, out_shape=shape, cost_estimate=cost)(x) @ jnp.ones((5, 7))

  jaxpr = jax.make_jaxpr(call)(jax.ShapeDtypeStruct((3, 5), jnp.float32)).jaxpr
  assert flops.matmul_flops(jaxpr) == 640 + 2 * 3 * 5 * 7
  assert flops.matmul_flops(jaxpr, 1 / 8) == 80 + 2 * 3 * 5 * 7
  assert [flops.filled_share(f, 4) for f in (None, 0.0, 2.0, 9.0)] == [1 / 4, 1 / 4, 1 / 2, 1 / 4]
  assert flops.filled_share(None, 1) == flops.filled_share(2.0, 1) == 1.0


def test_a_kernel_that_declares_nothing_counts_the_products_of_each_step():
  def kernel(x_ref, y_ref):
    y_ref[...] = x_ref[...] @ x_ref[...]

  def call(x):
    spec = pl.BlockSpec((8, 8), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(kernel, out_shape=shape, grid=(3,), in_specs=[spec], out_specs=spec)(x)

  assert count(call, (24, 8)) == 3 * 2 * 8 * 8 * 8
  assert count(jax.vmap(call), (5, 24, 8)) == 5 * 3 * 2 * 8 * 8 * 8


def test_a_region_counts_on_all_of_its_devices():
  mesh = jax.make_mesh((4,), ('a',), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.shard_map(
      jnp.dot, mesh=mesh, in_specs=(PartitionSpec('a'), PartitionSpec()),
      out_specs=PartitionSpec('a'),
  )
  assert count(split, (8, 5), (5, 7)) == 2 * 8 * 5 * 7


PROGRAM = '''
%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %g = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%x), channel_id=4, dimensions={0}
  ROOT %t = (s32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%i, %y)
}

%condition (p: (s32[], bf16[4,8])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(7)
  %p.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.3), direction=LT
}

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

ENTRY %main (q: bf16[4,8]) -> bf16[4,8] {
  %w = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%tuple), condition=%condition, body=%body
  %r = (f32[4,8]{1,0}, f32[4,8]{1,0}) all-reduce-start(%z), to_apply=%sum
  ROOT %d = f32[4,8]{1,0} all-reduce-done(%r)
}
'''


def test_collectives_in_a_loop_count_each_time_and_halves_once():
  assert hlo.collectives(PROGRAM) == {
      'all-gather': {'count': 7, 'bytes': 7 * 16 * 8 * 2},
      'all-reduce': {'count': 1, 'bytes': 4 * 8 * 4},
  }
  unknown = PROGRAM.replace('direction=LT', 'direction=NE')
  assert hlo.collectives(unknown)['all-gather']['count'] == 1


def test_every_planned_run_is_a_variant_that_fills_its_slice():
  for plan in plans.PLANS:
    experiment = flags.load_config(f'configs/{plan.config}.py:{plan.variant}')
    mesh = dataclasses.asdict(experiment.mesh)
    sizes = [mesh[axis] for axis in ('pipeline', 'data', 'expert', 'tensor')]
    chips = plans.SLICES[plan.slice].chips
    assert sizes[0] * sizes[1] * sizes[2] * sizes[3] == chips, plan.name
    assert experiment.train.batch_size % (mesh['data'] * mesh['expert']) == 0, plan.name


SMALL = '''
from moejax import config

def get_config(way):
  mesh = {'tensor': dict(data=2, tensor=2), 'expert': dict(data=1, expert=4)}[way]
  return config.Experiment(
      model=config.DecoderConfig(
          family='grin', vocab_size=512, d_model=256, d_head=64, d_ff=256, num_heads=4,
          num_kv_heads=2, num_layers=2, max_positions=128, norm='layer', eos_ids=(1,),
          moe=config.DecoderMoeConfig(
              num_experts=8, top_k=2, router='sparsemixer_v2', exchange_factor=2.0),
      ),
      mesh=config.MeshConfig(**mesh),
      data=config.DataConfig(sequence_length=128),
      train=config.TrainConfig(
          steps=2000, batch_size=8, compute_dtype='bfloat16', remat=True, scan_layers=True),
  )
'''


@pytest.mark.long
@pytest.mark.skipif(
    not (pathlib.Path(sys.prefix) / 'tpu' / 'libtpu').is_dir(), reason='no TPU compiler'
)
@pytest.mark.parametrize('way', ('tensor', 'expert'))
def test_a_small_step_compiles_for_a_real_slice(tmp_path, way):
  path = tmp_path / 'small.py'
  path.write_text(SMALL)
  done = subprocess.run(
      [sys.executable, '-m', 'experiments.pods.compile_step', '--config', f'{path}:{way}',
       '--slice', 'v5e-4'],
      cwd=ROOT, env=tpu_compiler.environment(), capture_output=True, text=True, check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  result = json.loads(done.stdout.splitlines()[-1])
  assert result['fits'] and result['total_bytes'] < 2**30
  moved = result['collectives']
  # Gradients are summed. Weights that are split over data are gathered for use; tokens travel to
  # experts and back, forward and backward, in each of two layers.
  assert moved['all-reduce']['count'] > 0
  assert ('all-gather' in moved) == (way == 'tensor')
  assert ('all-to-all' in moved) == (way == 'expert')
  if way == 'expert':
    assert moved['all-to-all']['count'] >= 2 * 4
  assert 0.5 < result['model_flops_a_chip'] / result['flops_a_chip'] <= 1
  more = result['flops_of_full_buffers_a_chip'] / result['flops_a_chip']
  assert more > 1.1 if way == 'expert' else more == 1.0
  assert '| yes |' in table.markdown({'small': result})
