"""A tiny experiment on a tiny text, shared by the training tests."""

import dataclasses
import functools
import json
from typing import Any

import jax
import numpy as np

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
      model=config_lib.ModelConfig(
          vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=1,
          num_decoder_layers=1, dropout_rate=0.0,
          moe=config_lib.MoeConfig(
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
  """Everything needed to step."""

  experiment: config_lib.Experiment
  mesh: Any
  optimizer: Any
  places: Any
  state: state_lib.TrainState
  step: Any


@functools.cache
def host_params(config: config_lib.ModelConfig, seed: int) -> Any:
  """Random parameters in host memory, made once for all tests."""
  return jax.device_get(model.init_params(config, jax.random.key(seed)))


def setup(config: config_lib.Experiment) -> Setup:
  """Builds mesh, optimizer, state and the step of an experiment."""
  mesh = sharding.make_mesh(config.mesh)
  step_lib.check_batch(config, mesh)
  params = host_params(config.model, config.train.seed)
  optimizer = optim.make_optimizer(config.optim, config.train.steps, params)
  places = state_lib.shardings(state_lib.abstract(config.model, optimizer), mesh)
  state = state_lib.init(config.model, optimizer, mesh, config.train.seed, params)
  step = step_lib.jit_train_step(config, optimizer, mesh, places)
  return Setup(
      experiment=config, mesh=mesh, optimizer=optimizer, places=places, state=state,
      step=_Quick(step),
  )


class _Quick:
  """A jitted function compiled without LLVM's optimizations: half the time, the same numbers."""

  def __init__(self, jitted):
    self._jitted, self._compiled = jitted, None

  def __call__(self, *args):
    if self._compiled is None:
      options = {'xla_backend_optimization_level': '0'}
      self._compiled = self._jitted.lower(*args).compile(compiler_options=options)
    return self._compiled(*args)


def run_steps(made: Setup, state: state_lib.TrainState, start: int, stop: int):
  """Runs steps on batches start..stop; returns the state and the losses."""
  source, losses = make_batches(made.experiment), []
  for index in range(start, stop):
    batch = batches.to_global(source, index, sharding.batch_sharding(made.mesh))
    state, metrics = made.step(state, batch)
    losses.append(float(metrics['loss']))
  return state, losses
