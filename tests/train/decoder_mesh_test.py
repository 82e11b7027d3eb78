"""A decoder's steps on many meshes: the same losses as on one device, within 1e-5."""

import functools

import jax
import numpy as np
import pytest

from moejax import config as config_lib
from moejax import sharding
from moejax.data import batches, packing
from moejax.model import Model
from moejax.train import optim
from moejax.train import state as state_lib
from moejax.train import step as step_lib

STEPS = 5
SEED = 1  # No token of it is so near a tie that rounding sends it to another expert.
# name: mesh (pipeline, data, expert, tensor), and settings.
MESHES = {
    '1x8x1x1': ((1, 8, 1, 1), {}),
    '1x1x8x1': ((1, 1, 8, 1), {}),
    '1x2x4x1 all-to-all': ((1, 2, 4, 1), {'model.moe.exchange_factor': 0.0}),
    '1x1x1x8': ((1, 1, 1, 8), {}),
    '1x2x2x2 unstacked': ((1, 2, 2, 2), {'train.scan_layers': False}),
    '1x4x1x2': ((1, 4, 1, 2), {}),
    '2x4x1x1': ((2, 4, 1, 1), {}),
    '2x2x2x1 all-to-all': ((2, 2, 2, 1), {'model.moe.exchange_factor': 0.0}),
    '4x1x1x2 microbatches': ((4, 1, 1, 2), {'train.pipeline_microbatches': 8}),
}


def experiment(mesh=(1, 1, 1, 1), **changes):
  """Sparse layers of eight experts, top-2 of a router without draws, every loss term."""
  pipeline, data, expert, tensor = mesh
  base = config_lib.Experiment(
      model=config_lib.DecoderConfig(
          family='grin', vocab_size=64, d_model=32, d_head=4, d_ff=16, num_heads=8,
          num_kv_heads=8, num_layers=4, norm='layer', eos_ids=(1,), initializer_std=0.1,
          moe=config_lib.DecoderMoeConfig(
              num_experts=8, top_k=2, router='topk', router_aux_loss_coef=0.02,
              router_z_loss_coef=0.001,
          ),
      ),
      data=config_lib.DataConfig(sequence_length=16),
      optim=config_lib.OptimConfig(learning_rate=1e-2, schedule='constant', warmup_steps=0),
      mesh=config_lib.MeshConfig(pipeline=pipeline, data=data, expert=expert, tensor=tensor),
      train=config_lib.TrainConfig(steps=STEPS, batch_size=16, seed=SEED, scan_layers=True),
  )
  return config_lib.apply_overrides(base, [f'{k}={str(v).lower()}' for k, v in changes.items()])


@functools.cache
def texts():
  rng = np.random.default_rng(0)
  tokens = (rng.zipf(1.4, 3000) % 60 + 2).astype(np.int32)
  corpus = batches.Corpus(tokens=tokens, starts=np.array([0, 700, 1500, 3000]))
  return packing.LmBatches(
      corpus=corpus, batch_size=16, sequence_length=16, seed=0, pad_id=0, eos_id=1, fixed=False
  )


@functools.cache
def params():
  """As every run would make them from its seed."""
  return Model.init(experiment().model, jax.random.key(SEED)).params


def run(config, seeded=False):
  """Losses of the first steps, and the last step's metrics; `seeded` makes its own parameters."""
  mesh = sharding.make_mesh(config.mesh)
  optimizer = optim.make_optimizer(config.optim, STEPS, state_lib.abstract_params(config))
  places = state_lib.shardings(state_lib.abstract(config, optimizer), mesh)
  state = state_lib.init(config, optimizer, mesh, None if seeded else params())
  step = step_lib.jit_train_step(config, optimizer, mesh, places)
  losses = []
  for i in range(STEPS):
    batch = batches.to_global(texts(), i, sharding.batch_sharding(mesh))
    state, metrics = step(state, batch)
    losses.append(float(metrics['loss']))
  return np.array(losses), {k: np.asarray(v) for k, v in metrics.items()}


@functools.cache
def one_device():
  return run(experiment())


@pytest.mark.long(but=('2x4x1x1',))
@pytest.mark.parametrize('name', MESHES)
def test_same_losses_on_every_mesh(name):
  mesh, changes = MESHES[name]
  config = experiment(mesh, **changes)
  assert int(np.prod(mesh)) == 8
  want, all_metrics = one_device()
  losses, metrics = run(config, seeded=name == '2x2x2x1 all-to-all')
  np.testing.assert_allclose(losses, want, rtol=1e-5)
  assert want[-1] < want[0]
  for key, value in all_metrics.items():
    np.testing.assert_allclose(metrics[key], value, rtol=2e-4, atol=1e-5, err_msg=key)
