"""Worker: a Phi-MoE's forward pass, training step and greedy decoding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import decoder_problem as problem
from experiments.bench import timing
from moejax import config as config_lib
from moejax import convert, generate, sharding, tree
from moejax.model import Model
from moejax.train import optim, step
from moejax.train import state as state_lib


def forward_rows(model: Model, quick: bool) -> list[dict[str, Any]]:
  batch, length = problem.text_shape(quick)
  tokens = jnp.asarray(problem.tokens(quick, batch, length))
  rows = []
  for dtype in problem.DTYPES:
    params = tree.cast_floats(model.params, jnp.dtype(dtype))
    own = Model(model.config, params)
    call = lambda own=own, dtype=dtype: jax.block_until_ready(
        own.apply(tokens, dtype=jnp.dtype(dtype)).logits_btv
    )
    work = {'mean_logit_size': float(jnp.abs(call()).mean())} if dtype == 'float32' else {}
    samples = timing.measure({'forward': call}, repeats=7)['forward']
    rows.append(timing.row(
        f'{dtype}, {batch} x {length} tokens', 'forward pass', 'moejax', samples, ours=True,
        work=work,
    ))
  return rows


def training_rows(model: Model, quick: bool) -> list[dict[str, Any]]:
  batch, length = problem.text_shape(quick)
  tokens = problem.tokens(quick, batch, length)
  data = {
      'tokens': tokens, 'targets': np.roll(tokens, -1, axis=1),
      'weights': np.ones(tokens.shape, np.float32) * (np.arange(length) < length - 1),
      'segments': np.ones(tokens.shape, np.int32),
      'positions': np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
  }
  rows = []
  for dtype in problem.dtypes_where_slow(quick):
    experiment = config_lib.Experiment(
        model=model.config,
        optim=config_lib.OptimConfig(learning_rate=1e-4, schedule='constant', warmup_steps=0,
                                     clip_norm=0.0),
        train=config_lib.TrainConfig(batch_size=batch, compute_dtype=dtype),
    )
    mesh = sharding.make_mesh(config_lib.MeshConfig(data=1))
    optimizer = optim.make_optimizer(experiment.optim, 1000, state_lib.abstract_params(experiment))
    places = state_lib.shardings(state_lib.abstract(experiment, optimizer), mesh)
    state = [state_lib.init(experiment, optimizer, mesh, model.params)]
    run = step.jit_train_step(experiment, optimizer, mesh, places)

    def call(state=state, run=run):
      state[0], metrics = run(state[0], data)
      jax.block_until_ready(metrics)

    samples = timing.measure({'step': call}, repeats=7)['step']
    rows.append(timing.row(
        f'{dtype}, {batch} x {length} tokens', 'training step', 'moejax', samples, ours=True,
    ))
    del state, call
  return rows


def decoding_rows(model: Model, quick: bool) -> list[dict[str, Any]]:
  rows = []
  for dtype in problem.dtypes_where_slow(quick):
    own = dataclasses.replace(model, params=tree.cast_floats(model.params, jnp.dtype(dtype)))
    for batch in (1, 8):
      prompts = problem.tokens(quick, batch, problem.PROMPT).tolist()
      call = lambda own=own, prompts=prompts, dtype=dtype: generate.generate(
          own, prompts, max_new_tokens=problem.NEW, stop_ids=(), dtype=dtype
      )
      work = {'sum_of_tokens': float(call().tokens.sum())} if dtype == 'float32' else {}
      samples = timing.measure({'decode': call}, repeats=5)['decode']
      rows.append(timing.row(
          f'{dtype}, batch {batch}', f'{problem.NEW} tokens after {problem.PROMPT}, greedy',
          'moejax', samples, ours=True, work=work,
      ))
  return rows


def main(quick: bool) -> list[dict[str, Any]]:
  with problem.folder(quick) as folder:
    model = convert.load(folder)
  return forward_rows(model, quick) + decoding_rows(model, quick) + training_rows(model, quick)


if __name__ == '__main__':
  timing.run(main)
