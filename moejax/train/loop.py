"""The training loop, top to bottom: data, state, resume, steps, the finished model folder."""

from collections.abc import Callable, Sequence
import dataclasses
import os
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import config as config_lib, errors, files, model, sharding, tree
from moejax.data import batches as batches_lib, span_corruption, text, tokenizer as tokenizer_lib
from moejax.train import checkpoint, optim, state as state_lib, step as step_lib, throughput, writers

SAVE_DTYPES = ('float32', 'bfloat16', 'float16')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """What a run reads: its tokenizer, training batches, and validation batches if any."""

  tokenizer: tokenizer_lib.Tokenizer
  train: batches_lib.SpanBatches
  valid: batches_lib.SpanBatches | None


def load_tokenizer(experiment: config_lib.Experiment, workdir: pathlib.Path):
  """The workdir's tokenizer, else the config's, else that of `init_from`, else a new one."""
  data = experiment.data
  if (workdir / tokenizer_lib.FILE_NAME).is_file():
    tokenizer = tokenizer_lib.load(workdir)
  elif data.tokenizer or experiment.init_from:
    tokenizer = tokenizer_lib.load(data.tokenizer or experiment.init_from)
  else:
    documents = text.documents(data.train_files)
    tokenizer = tokenizer_lib.train(documents, experiment.model.vocab_size, data.num_sentinels)
  if tokenizer.vocab_size != experiment.model.vocab_size:
    raise errors.UserError(
        f'the tokenizer has {tokenizer.vocab_size} ids, model.vocab_size is '
        f'{experiment.model.vocab_size}; make them equal'
    )
  if tokenizer.num_sentinels < data.num_sentinels:
    raise errors.UserError(
        f'the tokenizer has {tokenizer.num_sentinels} sentinels, data.num_sentinels is '
        f'{data.num_sentinels}; lower it'
    )
  return tokenizer


def span_batches(
    experiment: config_lib.Experiment,
    documents: Any,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    fixed: bool = False,
    name: str = 'data.train_files',
) -> batches_lib.SpanBatches:
  """Tokenizes documents and lays them out as the config says; `fixed` for evaluation."""
  data, config = experiment.data, experiment.model
  lengths = span_corruption.lengths_for(data.encoder_length, data.noise_density, data.mean_span)
  if lengths.spans > data.num_sentinels:
    raise errors.UserError(
        f'data.num_sentinels = {data.num_sentinels}: a sample of {lengths.tokens} tokens has '
        f'{lengths.spans} spans; raise it or lower data.encoder_length'
    )
  return batches_lib.SpanBatches(
      corpus=batches_lib.tokenize(documents, tokenizer, name),
      batch_size=experiment.train.batch_size, lengths=lengths, vocab_size=config.vocab_size,
      seed=data.seed, noise_density=data.noise_density, mean_span=data.mean_span,
      pad_id=config.pad_id, eos_id=config.eos_id, decoder_start_id=config.decoder_start_id,
      fixed=fixed,
  )


def load_data(experiment: config_lib.Experiment, workdir: pathlib.Path) -> Data:
  """Reads, tokenizes and lays out the texts; keeps the tokenizer in the workdir."""
  tokenizer = load_tokenizer(experiment, workdir)
  if jax.process_index() == 0:
    tokenizer.save(workdir)
  train = span_batches(experiment, text.documents(experiment.data.train_files), tokenizer)
  valid = None
  if experiment.data.valid_files:
    documents = text.documents(experiment.data.valid_files, 'data.valid_files')
    valid = span_batches(experiment, documents, tokenizer, fixed=True, name='data.valid_files')
  return Data(tokenizer=tokenizer, train=train, valid=valid)


def evaluate(
    eval_step: Callable, params: Any, batches: batches_lib.SpanBatches, count: int, mesh: Any
) -> dict[str, np.ndarray]:
  """Means over the first `count` fixed batches (0: all)."""
  stop = min(count, batches.num_batches) if count else batches.num_batches
  sums: Any = None
  for _, batch in batches_lib.prefetch(batches, 0, stop, sharding.batch_sharding(mesh)):
    new = eval_step(params, batch)
    sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
  return {name: np.asarray(v) for name, v in step_lib.summarize_eval(sums).items()}


class Meter:
  """Averages metrics between two log lines and turns them into speeds."""

  def __init__(self, flops_per_step: float, peak: float):
    self._flops, self._peak = flops_per_step, peak
    self.reset()

  def reset(self) -> None:
    """Starts a new interval now."""
    self._rows: list[Any] = []
    self._start = time.monotonic()

  def add(self, metrics: Any) -> None:
    self._rows.append(metrics)

  def means(self) -> dict[str, Any]:
    """Waits for the steps of the interval and closes it."""
    rows = jax.device_get(self._rows)
    seconds = time.monotonic() - self._start
    means = {name: np.mean([row[name] for row in rows], axis=0) for name in rows[0]}
    means['tokens_per_second'] = means['tokens'] * len(rows) / seconds
    means['seconds_per_step'] = seconds / len(rows)
    if self._peak > 0:
      means['model_flops_utilisation'] = self._flops * len(rows) / seconds / self._peak
    self.reset()
    return means


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
  """Makes the folder and tries to write into it; raises UserError when that fails."""
  path = pathlib.Path(workdir).absolute()
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe = path / f'.probe-{os.getpid()}'
    probe.write_bytes(b'moejax')
    probe.unlink()
  except OSError as error:
    raise files.os_error(path, error) from error
  return path


def initial_params(experiment: config_lib.Experiment) -> Any:
  """The parameters of `init_from`, or None to start from the seed."""
  if not experiment.init_from:
    return None
  loaded = model.Model.load(experiment.init_from)
  changed = checkpoint.differences(
      config_lib.to_json(loaded.config), config_lib.to_json(experiment.model), 'model'
  )
  shapes = [{p: a.shape for p, a in tree.flatten(x).items()}
            for x in (loaded.params, model.abstract_params(experiment.model))]
  if shapes[0] != shapes[1]:
    details = '; '.join(f'{k} is {a!r}, not {b!r}' for k, (a, b) in changed.items())
    raise errors.UserError(f'init_from {experiment.init_from} holds another model: {details}')
  return loaded.params


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

  Returns:
    {'step', 'finished', 'model', and the last evaluation's scalars as 'eval_...'}.

  Raises:
    UserError: anything in the config, the texts or the workdir that a user can mend.
  """
  train, started = experiment.train, time.monotonic()
  say = lambda line: print(line, file=sys.stderr, flush=True) if jax.process_index() == 0 else None
  if train.save_dtype not in SAVE_DTYPES:
    raise errors.UserError(f'train.save_dtype = {train.save_dtype!r}: one of {SAVE_DTYPES}')

  # --- Mesh, optimizer and checks that cost nothing
  mesh = sharding.make_mesh(experiment.mesh)
  step_lib.check_batch(experiment, mesh)
  optimizer = optim.make_optimizer(
      experiment.optim, train.steps, model.abstract_params(experiment.model)
  )
  workdir = prepare_workdir(workdir)

  # --- Data
  data = load_data(experiment, workdir)
  say(f'data: {len(data.train.corpus.tokens):,} tokens in {data.train.corpus.num_documents:,} '
      f'documents, {data.train.num_samples:,} samples an epoch')

  # --- State: fresh, or the newest checkpoint
  abstract = state_lib.abstract(experiment.model, optimizer)
  places = state_lib.shardings(abstract, mesh)
  checkpoints = checkpoint.Checkpoints(
      workdir / 'checkpoints', experiment, train.keep_checkpoints
  )
  if checkpoints.latest() is None:
    params = initial_params(experiment)
    state, index = state_lib.init(experiment.model, optimizer, mesh, train.seed, params), 0
  else:
    state, index, changed = checkpoints.restore(checkpoint.target_of(abstract, places))
    say(f'resumed at step {int(state.step)}')
    for line in changed:
      say(f'  changed since the checkpoint: {line}')
  files.write_json(workdir / 'config.json', config_lib.to_json(experiment))
  first = int(state.step)
  say(f'model: {tree.count(state.params):,} parameters on {mesh.size} '
      f'{jax.devices()[0].platform} device(s)')

  # --- Steps
  train_step = step_lib.jit_train_step(experiment, optimizer, mesh, places)
  eval_step = step_lib.jit_eval_step(experiment, mesh, places)
  hooks = default_hooks(workdir, first) if hooks is None else hooks
  meter = make_meter(experiment, data, mesh)
  rate = optim.schedule(experiment.optim, train.steps)
  last_eval: dict[str, Any] = {}

  def emit(kind, step, metrics):
    for hook in hooks:
      hook(writers.Record(kind=kind, step=step, total_steps=train.steps, metrics=metrics))

  step, saved = first, first if checkpoints.latest() is not None else -1
  rows = batches_lib.prefetch(
      data.train, index, index + train.steps - first, sharding.batch_sharding(mesh)
  )
  for index, batch in rows:
    state, metrics = train_step(state, batch)
    meter.add(metrics)
    step += 1
    end = step == train.steps or should_stop() or (
        0 < train.max_seconds < time.monotonic() - started
    )
    if end or due(step, train.log_every):
      extra = {'learning_rate': float(rate(step - 1)), 'epoch': data.train.epoch_of(index + 1)}
      emit('train', step, {**meter.means(), **extra})
    if data.valid is not None and (end or due(step, train.eval_every)):
      last_eval = evaluate(eval_step, state.params, data.valid, train.eval_batches, mesh)
      emit('eval', step, last_eval)
      meter.reset()
    if end or due(step, train.checkpoint_every):
      checkpoints.save(state, step, index + 1)
      saved = step
      meter.reset()
    if end:
      break
  rows.close()

  # --- The finished folder
  if saved != step:
    checkpoints.save(state, step, index)
  checkpoints.wait()
  checkpoints.close()
  for hook in hooks:
    getattr(hook, 'close', lambda: None)()
  if jax.process_index() == 0:
    save_model(experiment, state, workdir)
    say(f'step {step}: model in {workdir / "model"}')
  scalars = {f'eval_{n}': float(v) for n, v in last_eval.items() if '/' not in n}
  return {
      'step': step, 'finished': step >= train.steps, 'model': str(workdir / 'model'), **scalars
  }


def due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def make_meter(experiment: config_lib.Experiment, data: Data, mesh: Any) -> Meter:
  """A meter that knows the step's FLOPs and the mesh's peak."""
  train, lengths = experiment.train, data.train.lengths
  peak = train.peak_flops_per_second or throughput.measure_peak(train.compute_dtype)
  flops = throughput.train_flops(
      experiment.model, train.batch_size, lengths.inputs, lengths.targets
  )
  return Meter(flops, peak * mesh.size)


def save_model(
    experiment: config_lib.Experiment, state: state_lib.TrainState, workdir: pathlib.Path
) -> None:
  """Writes `workdir/model`, a moejax model folder with the tokenizer."""
  params = tree.cast_floats(state.params, jnp.dtype(experiment.train.save_dtype))
  model.Model(experiment.model, params).save(
      workdir / 'model',
      provenance={
          'trained': {'step': int(state.step), 'experiment': config_lib.to_json(experiment)}
      },
      tokenizer_from=workdir,
  )
