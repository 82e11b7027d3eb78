"""The same short training for every cut model, by configs/recover.py, on batches made once."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import recover
from moejax import config, sharding
from moejax.data import tokenizer as tokenizer_lib
from moejax.model import Model
from moejax.train import low_rank
from moejax.train import state as state_lib
from moejax.train import step as step_lib

Batch = dict[str, Any]


class Training:
  """Trains models of one family, or looks at them; a compiled step serves all of one config.

  teacher: the folder they are held to; None for the task alone. size: samples of a batch.
  """

  def __init__(
      self, teacher: pathlib.Path | None, steps: int, size: int, learning_rate: float
  ):
    self.steps, self.size, self._rate = steps, size, learning_rate
    self._mesh = sharding.make_mesh(config.MeshConfig(data=1))
    self._teacher = None if teacher is None else Model.load(teacher)
    self._compiled = functools.lru_cache(maxsize=4)(self._compile)

  def _compile(self, experiment: config.Experiment, sentinel: int) -> Any:
    optimizer = low_rank.make_optimizer(experiment, state_lib.abstract_params(experiment))
    places = state_lib.shardings(state_lib.abstract(experiment, optimizer), self._mesh)
    step = step_lib.jit_train_step(experiment, optimizer, self._mesh, places, self._teacher)
    look = step_lib.jit_eval_step(experiment, self._mesh, places, first_sentinel=sentinel)
    return optimizer, step, look

  def _experiment(self, folder: pathlib.Path) -> config.Experiment:
    kind = 'task' if self._teacher is None else 'full'
    own = recover.get_config(f'{kind}@{folder}')
    return dataclasses.replace(
        own, init_from='', mesh=config.MeshConfig(data=1),
        distill=dataclasses.replace(own.distill, teacher='given' if self._teacher else ''),
        train=dataclasses.replace(own.train, steps=max(self.steps, 1), batch_size=self.size),
        optim=dataclasses.replace(
            own.optim, warmup_steps=min(16, self.steps // 4), learning_rate=self._rate
        ),
    )

  def __call__(
      self, folder: pathlib.Path, batch: Callable[[int], Batch], validation: Sequence[Batch],
      out: pathlib.Path | None = None, train: bool = True, provenance: Mapping[str, Any] = {},
  ) -> dict[str, float]:
    """Trains a folder's model on batch(0), batch(1), ...; loss and accuracy on the validation.

    Args:
      validation: batches of one sample. out: a folder for the trained model, whose manifest has
        `provenance`. train: False only looks at the model.
    """
    experiment = self._experiment(folder)
    sentinel = tokenizer_lib.load(str(folder)).first_sentinel
    optimizer, step, look = self._compiled(experiment, sentinel)
    state = state_lib.init(experiment, optimizer, self._mesh, Model.load(folder).params)
    put = functools.partial(jax.device_put, device=sharding.batch_sharding(self._mesh))
    for i in range(self.steps if train else 0):
      state, _ = step(state, put(batch(i)))
    sums: Any = None
    for piece in stacked(validation, self.size):
      new = look(state.params, put(piece))
      sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
    if out is not None:
      made = Model(experiment.model, state.params)
      made.save(out, provenance=provenance, tokenizer_from=folder)
    weight = float(sums['weight'])
    return {name: float(sums[name]) / weight for name in ('loss', 'accuracy')}


def stacked(batches: Sequence[Batch], size: int) -> list[Batch]:
  """Batches of `size` samples from batches of one; of the last what is missing weighs nothing."""
  made = []
  for start in range(0, len(batches), size):
    piece = list(batches[start : start + size])
    empty = {**piece[0], 'weights': np.zeros_like(piece[0]['weights'])}
    piece += [empty] * (size - len(piece))
    made.append({name: np.concatenate([b[name] for b in piece]) for name in piece[0]})
  return made
