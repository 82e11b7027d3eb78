"""The training loop, top to bottom: data, state, resume, steps, the finished model folder."""

from collections.abc import Callable, Sequence
import dataclasses
import os
import pathlib
import sys
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from moejax import config as config_lib
from moejax import errors, files, model, sharding, tree
from moejax.data import batches as batches_lib
from moejax.nn import aligned, members
from moejax.train import checkpoint, inputs, low_rank, optim, spikes, throughput, writers
from moejax.train import state as state_lib
from moejax.train import step as step_lib

SAVE_DTYPES = ('float32', 'bfloat16', 'float16')


def evaluate(
    eval_step: Callable[[Any, Any], Any],
    params: Any,
    batches: batches_lib.Batches,
    train: config_lib.TrainConfig,
    mesh: Mesh,
) -> dict[str, np.ndarray]:
  """Means over the first `train.eval_batches` fixed batches (0: all)."""
  stop = min(train.eval_batches or batches.num_batches, batches.num_batches)
  sums: Any = None
  for _, batch in batches_lib.prefetch(batches, 0, stop, sharding.batch_sharding(mesh)):
    new = eval_step(params, batch)
    sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
  return {name: np.asarray(v) for name, v in step_lib.summarize_eval(sums).items()}


def default_hooks(workdir: pathlib.Path, resumed_step: int) -> list[writers.Hook]:
  """Terminal, `metrics.jsonl` and `tensorboard/`; nothing on processes other than the first."""
  if jax.process_index() != 0:
    return []
  return [
      writers.Terminal(),
      writers.JsonLines(workdir / 'metrics.jsonl', resumed_step),
      writers.TensorBoard(workdir / 'tensorboard', resumed_step),
  ]


def prepare_workdir(workdir: str | os.PathLike) -> pathlib.Path:
  """Makes the folder and tries to write into it; UserError if the run could not end there."""
  path = pathlib.Path(workdir).absolute()
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise files.os_error(path, error) from error
  files.require_target(path / 'model')
  return path


def initial_params(experiment: config_lib.Experiment) -> Any:
  """The parameters of `init_from`, or None to start from the seed."""
  if not experiment.init_from:
    config = experiment.model
    if not experiment.train.aligned_start:
      return None
    if not isinstance(config, config_lib.EncDecConfig):
      raise errors.UserError('train.aligned_start is for encoder-decoders: set it to false')
    return aligned.align(model.init_params(config, jax.random.key(experiment.train.seed)), config)
  loaded = model.Model.load(experiment.init_from)
  nodes = [p for p, leaf in tree.flatten(loaded.params).items() if not tree.is_array(leaf)]
  if nodes:
    raise errors.UserError(
        f'init_from {experiment.init_from} is compressed ({nodes[0]}): training needs the model '
        'before it was compressed'
    )
  changed = checkpoint.differences(
      config_lib.to_json(loaded.config), config_lib.to_json(experiment.model), 'model'
  )
  shapes = [{p: a.shape for p, a in tree.flatten(x).items()}
            for x in (loaded.params, model.abstract_params(experiment.model))]
  if shapes[0] != shapes[1]:
    details = '; '.join(f'{k} is {a!r}, not {b!r}' for k, (a, b) in changed.items())
    raise errors.UserError(f'init_from {experiment.init_from} holds another model: {details}')
  for path, (was, now) in changed.items():
    say(f'  not as in {experiment.init_from}: {path}: {was!r} -> {now!r}')
  return loaded.params


def load_teacher(experiment: config_lib.Experiment, mesh: Mesh) -> model.Model | None:
  """The model that `distill.teacher` names, on the mesh."""
  folder = experiment.distill.teacher
  if not folder:
    return None
  teacher = model.Model.load(folder)
  ours, theirs = experiment.model, teacher.config
  if (ours.vocab_size, ours.stacks) != (theirs.vocab_size, theirs.stacks):
    raise errors.UserError(
        f'distill.teacher {folder} is a {theirs.family} of {theirs.vocab_size} words; the student, '
        f'a {ours.family} of {ours.vocab_size}, cannot be held to its logits'
    )
  places = sharding.param_shardings(teacher.params, mesh)
  return dataclasses.replace(teacher, params=jax.device_put(teacher.params, places))


def say(line: str) -> None:
  """Prints a line about the run, on the first process only."""
  if jax.process_index() == 0:
    print(line, file=sys.stderr, flush=True)


class Log:
  """Hands records to hooks and remembers the last metrics of each kind."""

  def __init__(self, hooks: Sequence[writers.Hook], total_steps: int):
    self._hooks, self._total = hooks, total_steps
    self.last: dict[str, dict[str, Any]] = {'train': {}, 'eval': {}}

  def write(self, kind: str, step: int, metrics: dict[str, Any]) -> None:
    self.last[kind] = metrics
    record = writers.Record(kind=kind, step=step, total_steps=self._total, metrics=metrics)
    for hook in self._hooks:
      hook(record)

  def evaluated(self) -> dict[str, float]:
    """The scalars of the last evaluation, as 'eval_...'."""
    return {f'eval_{n}': float(v) for n, v in self.last['eval'].items() if '/' not in n}

  def close(self) -> None:
    for hook in self._hooks:
      getattr(hook, 'close', lambda: None)()


def check(experiment: config_lib.Experiment) -> None:
  """Raises UserError for a dtype or an action that training does not know."""
  train = experiment.train
  known = {
      'save_dtype': SAVE_DTYPES, 'compute_dtype': step_lib.COMPUTE_DTYPES,
      'on_spike': spikes.ACTIONS,
  }
  for name, allowed in known.items():
    if getattr(train, name) not in allowed:
      raise errors.UserError(f'train.{name} = {getattr(train, name)!r}: one of {allowed}')
  if train.members > 1:
    members.with_members(experiment.model, train.members)
  head = getattr(experiment.model, 'head', '')
  if head == 'labels':
    raise errors.UserError(
        "model.head = 'labels': texts alone have none; call train.step with batches whose targets "
        'at the first token are labels'
    )
  if head == 'none' and not (experiment.distill.teacher and experiment.distill.hidden_weight):
    raise errors.UserError(
        "model.head = 'none': there is nothing to learn but hidden states; name distill.teacher "
        'and set distill.hidden_weight'
    )
  if not experiment.distill.teacher and not experiment.distill.task_weight:
    raise errors.UserError(
        'distill.task_weight = 0 and no distill.teacher: there is nothing to learn; name a teacher'
    )
  if experiment.activity.form and not step_lib.has_dense_ffns(experiment.model):
    raise errors.UserError(
        f'activity.form = {experiment.activity.form!r}: the model has no dense FFN to measure'
    )
  for folder in (experiment.init_from, experiment.distill.teacher):
    if folder:
      files.require_folder(folder)


def start(
    experiment: config_lib.Experiment,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    places: state_lib.TrainState,
    checkpoints: checkpoint.Checkpoints,
) -> tuple[state_lib.TrainState, int]:
  """The newest checkpoint's state and next batch index, or a fresh state and 0."""
  if checkpoints.latest() is None:
    return state_lib.init(experiment, optimizer, mesh, initial_params(experiment)), 0
  target = checkpoint.target_of(state_lib.abstract(experiment, optimizer), places)
  state, index, changed = checkpoints.restore(target)
  say(f'resumed at step {int(state.step)}')
  for line in changed:
    say(f'  changed since the checkpoint: {line}')
  return state, index


def run(
    experiment: config_lib.Experiment,
    workdir: str | os.PathLike,
    *,
    hooks: Sequence[writers.Hook] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
  """Trains, or goes on training what is in `workdir`, and writes `workdir/model`.

  Args:
    experiment: the whole configuration.
    workdir: gets tokenizer.json, config.json, checkpoints/, metrics.jsonl, tensorboard/, model/.
    hooks: called with every `writers.Record`; None: terminal, JSON lines and TensorBoard.
    should_stop: asked after each step; True saves a checkpoint and ends the run early.

  Returns {'step', 'finished', 'model', and the last evaluation's scalars as 'eval_...'}; raises
  UserError for anything in the config, the texts or the workdir that a user can mend.
  """
  train, started = experiment.train, time.monotonic()

  # --- Checks, mesh, data, state
  check(experiment)
  mesh = sharding.make_mesh(experiment.mesh)
  step_lib.check_fits(experiment, mesh)
  optimizer = low_rank.make_optimizer(experiment, state_lib.abstract_params(experiment))
  workdir = prepare_workdir(workdir)
  data = inputs.load(experiment, workdir, resuming=checkpoint.any_in(workdir / 'checkpoints'))
  say(f'data: {data.train.num_tokens:,} tokens in {data.train.num_documents:,} '
      f'documents, {data.train.num_samples:,} samples an epoch')
  places = state_lib.shardings(state_lib.abstract(experiment, optimizer), mesh)
  keep = train.keep_checkpoints
  with checkpoint.Checkpoints(workdir / 'checkpoints', experiment, keep) as checkpoints:
    state, begin = start(experiment, optimizer, mesh, places, checkpoints)
    if jax.process_index() == 0:
      files.write_json(workdir / 'config.json', config_lib.to_json(experiment))
    first = step = int(state.step)
    say(f'model: {tree.count(state.params):,} parameters on {mesh.size} device(s)')

    # --- Steps
    train_step = step_lib.jit_train_step(
        experiment, optimizer, mesh, places, load_teacher(experiment, mesh)
    )
    eval_step = step_lib.jit_eval_step(
        experiment, mesh, places, first_sentinel=data.tokenizer.first_sentinel
    )
    log = Log(default_hooks(workdir, first) if hooks is None else hooks, train.steps)
    meter = throughput.make_meter(experiment, data.train, mesh.size)
    watch = spikes.Watch(train.on_spike, train.spike_nats)
    rate = optim.schedule(experiment.optim, train.steps)
    over = lambda: agreed(should_stop() or 0 < train.max_seconds < time.monotonic() - started)
    stop, placed = begin + train.steps - first, sharding.batch_sharding(mesh)
    for index, batch in batches_lib.prefetch(data.train, begin, stop, placed):
      state, metrics = train_step(state, batch)
      meter.add(metrics)
      step += 1
      watch.add(step, metrics)
      end = step == train.steps or over()
      if end or due(step, train.log_every):
        extra = {'learning_rate': float(rate(step - 1)), 'epoch': data.train.epoch_of(index + 1)}
        norm = float(step_lib.param_norm(state.params))
        log.write('train', step, {**meter.means(), **extra, 'param_norm': norm})
      if data.valid is not None and (end or due(step, train.eval_every)):
        log.write('eval', step, evaluate(eval_step, state.params, data.valid, train, mesh))
        meter.reset()
      if end or due(step, train.checkpoint_every):
        watch.settle()
        checkpoints.save(state, step, index + 1)
        meter.reset()
      if end:
        break

  # --- The finished folder
  log.close()
  save_model(experiment, state, workdir)
  say(f'step {step}: model in {workdir / "model"}')
  return {
      'step': step, 'finished': step >= train.steps, 'model': str(workdir / 'model'),
      **log.evaluated(),
  }


def agreed(answer: bool) -> bool:
  """The first process's answer, on every process: they must stop at the same step."""
  if jax.process_count() == 1:
    return answer
  return bool(multihost_utils.broadcast_one_to_all(np.int32(answer)))


def due(step: int, every: int) -> bool:
  """Whether an interval ends at this step; an interval of 0 never does."""
  return every > 0 and step % every == 0


def save_model(
    experiment: config_lib.Experiment, state: state_lib.TrainState, workdir: pathlib.Path
) -> None:
  """Writes `workdir/model`, a moejax model folder with the tokenizer; the first process writes."""
  params = state_lib.model_params(experiment, state)
  dtype = jnp.dtype(experiment.train.save_dtype)
  if jax.process_count() > 1:
    params = multihost_utils.process_allgather(params, tiled=True)
  if jax.process_index() != 0:
    return
  model.Model(experiment.model, low_rank.finished(params, experiment.low_rank, dtype)).save(
      workdir / 'model',
      provenance={
          'trained': {'step': int(state.step), 'experiment': config_lib.to_json(experiment)}
      },
      tokenizer_from=workdir,
  )
