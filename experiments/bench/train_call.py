"""A training step as a call that a worker can time."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from experiments.bench import decoder_problem as problem
from moejax import config as config_lib
from moejax import sharding
from moejax.train import optim, step
from moejax.train import state as state_lib


def experiment(model: config_lib.ModelConfig, batch: int, dtype: str) -> config_lib.Experiment:
  """AdamW at a constant rate; gradients are not clipped, for the peer clips none."""
  return config_lib.Experiment(
      model=model,
      optim=config_lib.OptimConfig(
          learning_rate=1e-4, schedule='constant', warmup_steps=0, clip_norm=0.0
      ),
      train=config_lib.TrainConfig(batch_size=batch, compute_dtype=dtype),
  )


def optimizer(run: config_lib.Experiment) -> optax.GradientTransformation:
  return optim.make_optimizer(run.optim, 1000, state_lib.abstract_params(run))


def batch_of(quick: bool, batch: int, length: int) -> dict[str, np.ndarray]:
  """Rows of one text each; the last place of a row has no target."""
  tokens = problem.tokens(quick, batch, length)
  return {
      'tokens': tokens, 'targets': np.roll(tokens, -1, axis=1),
      'weights': np.ones(tokens.shape, np.float32) * (np.arange(length) < length - 1),
      'segments': np.ones(tokens.shape, np.int32),
      'positions': np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
  }


def training_step(
    run: config_lib.Experiment, data: dict[str, np.ndarray], params: Any = None
) -> Callable[[], None]:
  """The next step of a run on one batch, again and again; blocks until it is done."""
  mesh = sharding.make_mesh(config_lib.MeshConfig(data=1))
  made = optimizer(run)
  places = state_lib.shardings(state_lib.abstract(run, made), mesh)
  state = [state_lib.init(run, made, mesh, params)]
  compiled = step.jit_train_step(run, made, mesh, places)

  def call() -> None:
    state[0], metrics = compiled(state[0], data)
    jax.block_until_ready((state[0], metrics))

  return call
