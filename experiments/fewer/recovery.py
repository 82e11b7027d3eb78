"""The same short training for every cut model, by configs/recover.py, on batches read once."""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import recover
from moejax import config, evaluate, sharding
from moejax.data import layout, text
from moejax.data import tokenizer as tokenizer_lib
from moejax.model import Model
from moejax.train import low_rank
from moejax.train import state as state_lib
from moejax.train import step as step_lib


class Recovery:
  """Trains a cut model for `steps`, held to the model it was cut from."""

  def __init__(self, folder: pathlib.Path, patterns: Sequence[str], steps: int, batch: int):
    self.steps, self.batch = steps, batch
    self._mesh = sharding.make_mesh(config.MeshConfig(data=1))
    self._teacher = Model.load(folder)
    self._sentinel = tokenizer_lib.load(str(folder)).first_sentinel
    self._batches = layout.make_batches(
        self._teacher.config, evaluate.data_config(folder), text.documents(list(patterns)),
        tokenizer_lib.load(str(folder)), batch_size=batch,
    )
    # A compiled step serves every model of one config.
    self._compiled = functools.lru_cache(maxsize=2)(self._compile)

  def _compile(self, experiment: config.Experiment) -> Any:
    shapes = state_lib.abstract_params(experiment)
    optimizer = low_rank.make_optimizer(experiment, shapes)
    places = state_lib.shardings(state_lib.abstract(experiment, optimizer), self._mesh)
    step = step_lib.jit_train_step(experiment, optimizer, self._mesh, places, self._teacher)
    look = step_lib.jit_eval_step(
        experiment, self._mesh, places, first_sentinel=self._sentinel
    )
    return optimizer, step, look

  def __call__(
      self, folder: pathlib.Path, validation: Sequence[dict[str, Any]], seed: int
  ) -> dict[str, float]:
    """Losses of a folder's model on the validation batches, in nats: before and after."""
    settings = recover.get_config(f'full@{folder}')
    experiment = dataclasses.replace(
        settings, init_from='', distill=dataclasses.replace(settings.distill, teacher='given'),
        train=dataclasses.replace(settings.train, steps=self.steps, batch_size=self.batch),
        optim=dataclasses.replace(settings.optim, warmup_steps=min(16, self.steps // 4)),
        mesh=config.MeshConfig(data=1),
    )
    optimizer, step, look = self._compiled(experiment)
    params = Model.load(folder).params
    state = state_lib.init(experiment, optimizer, self._mesh, params)
    place = sharding.batch_sharding(self._mesh)
    put = functools.partial(jax.device_put, device=place)
    loss = lambda: self._loss(look, state.params, map(put, _stacked(validation, self.batch)))
    before = loss()
    for i in range(self.steps):
      state, _ = step(state, put(self._batches.batch(seed * self.steps + i)))
    return {'before': before, 'after': loss()}

  def _loss(self, look, params, batches) -> float:
    sums: Any = None
    for batch in batches:
      new = look(params, batch)
      sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
    return float(sums['loss'] / sums['weight'])


def _stacked(batches: Sequence[dict[str, Any]], size: int) -> list[dict[str, Any]]:
  """Batches of `size` samples from batches of one; of the last what is missing weighs nothing."""
  made = []
  for start in range(0, len(batches), size):
    piece = list(batches[start : start + size])
    empty = {**piece[0], 'weights': np.zeros_like(piece[0]['weights'])}
    piece += [empty] * (size - len(piece))
    made.append({name: np.concatenate([b[name] for b in piece]) for name in piece[0]})
  return made
