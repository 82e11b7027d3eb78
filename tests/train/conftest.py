"""A tiny experiment on a tiny text, shared by the training tests."""

import functools
import json
import sys
from typing import Any

import jax
import numpy as np
import pytest

from moejax import config as config_lib
from moejax import model, sharding
from moejax.data import batches, span_corruption
from moejax.train import optim
from moejax.train import state as state_lib
from moejax.train import step as step_lib

VOCAB = 384


def experiment(**overrides: Any) -> config_lib.Experiment:
  """Two sparse layers of four experts; overrides are 'section__field' = value."""
  base = config_lib.Experiment(
      model=config_lib.EncDecConfig(
          vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=1,
          num_decoder_layers=1, dropout_rate=0.0,
          moe=config_lib.EncDecMoeConfig(
              num_experts=4, encoder_sparse_step=1, decoder_sparse_step=1, router_jitter_noise=0.0
          ),
      ),
      data=config_lib.DataConfig(encoder_length=32, num_sentinels=20),
      optim=config_lib.OptimConfig(warmup_steps=2, learning_rate=3e-3),
      mesh=config_lib.MeshConfig(data=1),
      train=config_lib.TrainConfig(steps=10, batch_size=16, log_every=1),
  )
  settings = [f'{name.replace("__", ".")}={json.dumps(v)}' for name, v in overrides.items()]
  return config_lib.apply_overrides(base, settings)


def make_batches(config: config_lib.Experiment, tokens: int = 3000) -> batches.SpanBatches:
  """Batches of two documents of skewed random tokens."""
  rng = np.random.default_rng(0)
  ids = (rng.zipf(1.5, tokens) % (VOCAB - 30) + 3).astype(np.int32)
  corpus = batches.Corpus(tokens=ids, starts=np.array([0, tokens // 3, tokens]))
  return batches.SpanBatches(
      corpus=corpus, batch_size=config.train.batch_size,
      lengths=span_corruption.lengths_for(config.data.encoder_length), vocab_size=VOCAB,
  )


@functools.cache
def host_params(config: config_lib.ModelConfig, seed: int) -> Any:
  """Random parameters in host memory, made once for all tests."""
  return jax.device_get(jax.jit(lambda key: model.init_params(config, key))(jax.random.key(seed)))


class Setup:
  """Mesh, optimizer and compiled step of an experiment; shared by tests, so it holds no state."""

  def __init__(self, config: config_lib.Experiment):
    self.experiment = config
    self.mesh = sharding.make_mesh(config.mesh)
    step_lib.check_fits(config, self.mesh)
    self.params = host_params(config.model, config.train.seed)
    shapes = state_lib.abstract_params(config)
    self.optimizer = optim.make_optimizer(config.optim, config.train.steps, shapes)
    self.abstract = state_lib.abstract(config, self.optimizer)
    self.places = state_lib.shardings(self.abstract, self.mesh)
    self.batches = make_batches(config)
    self._step: Any = None

  def fresh(self) -> state_lib.TrainState:
    """The state before the first step."""
    return state_lib.init(self.experiment, self.optimizer, self.mesh, self.params)

  def batch(self, index: int) -> Any:
    """A global batch."""
    return batches.to_global(self.batches, index, sharding.batch_sharding(self.mesh))

  def step(self, state: state_lib.TrainState, batch: Any) -> Any:
    """One training step; the state is donated."""
    if self._step is None:
      jitted = step_lib.jit_train_step(self.experiment, self.optimizer, self.mesh, self.places)
      self._step = jitted.lower(state, batch).compile()
    return self._step(state, batch)

  def run(self, state: state_lib.TrainState, start: int, stop: int):
    """Runs steps on batches start..stop; returns the state and the losses."""
    losses = []
    for index in range(start, stop):
      state, metrics = self.step(state, self.batch(index))
      losses.append(float(metrics['loss']))
    return state, losses


setup = functools.cache(Setup)


@pytest.fixture
def common() -> Any:
  """This module."""
  return sys.modules[__name__]
