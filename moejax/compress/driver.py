"""compress(model, transform, batches): layer by layer, group by group, resumable.

QMoE section 3.2: the hidden states of all samples lie in one host buffer; a layer's experts are
compressed from the inputs that the layers before, compressed already, give them, and what they
compute goes back into the buffer. Weights are read when their turn comes. A finished group of
experts is on disk before the next begins, so peak memory does not grow with the layers, and a run
that was killed goes on there and ends with the same files.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import hashlib
import json
from pathlib import Path
import resource
import shutil
import time
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from moejax import account, files, store, tree
from moejax import config as config_lib
from moejax.compress import base, gradients, parts, sources, stats, walker
from moejax.compress import samples as samples_lib
from moejax.errors import UserError
from moejax.model import Model

FORMAT = 2
# Array fields of the largest node: a mixed one of every form.
_MOST_FIELDS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """What `compress` made.

  model: the compressed model, or None where it went to `folder`. folder: that folder, or None.
  report: JSON values, see `compress`. states: final hidden states of all samples by stack,
  float32 [tokens, d], validation last.
  """

  model: Model | None
  folder: Path | None
  report: dict[str, Any]
  states: Mapping[str, np.ndarray]


def compress(
    model: Model | str | Path, transform: base.Transform | base.Chain,
    batches: Iterable[Mapping[str, Any]], out_folder: str | Path | None = None, *,
    validation_batches: Iterable[Mapping[str, Any]] = (), sentinel: int | None = None,
    statistics: stats.Statistics | None = None, progress: bool = False,
) -> Result:
  """Compresses a model with calibration batches (arXiv 2310.16795 section 3.2 for the walk).

  Args:
    model: a Model, or a moejax folder that is read piece by piece.
    transform: what to do to the experts; a chain takes one pass over the model a step.
    batches: calibration, see `samples.collect`; no expert drops tokens for capacity.
    out_folder: where the compressed model goes (with report.json); its unfinished work lies beside
      it in `.<name>.compressing`, from which the same call resumes. None keeps the model in memory.
    validation_batches: samples that run along and are in no statistic; the report has their loss.
    sentinel: the least special token id; None for `layout.first_sentinel`.
    statistics: of this model, for a first step that wants some; None measures them on `batches`.
    progress: show a progress bar.

  The report has 'model' (family, decoder, experts, choices), 'steps' (transform, seconds,
  peak_host_bytes), 'layers' (a row for each expert matrix: path, expert, transform, bits,
  bits_per_weight, zeros, relative_output_error, error_before_refit, fallback, tokens, ...),
  'before' and 'after' (as `account.summary`, and 'loss' over the validation samples, a mean over
  their weights; None without any), 'warnings', what a user should know (also given to Python's
  `warnings`), and 'over_budget', the layers whose groups take more than a
  search's target_bits.

  Raises:
    UserError: no experts to compress, weights already compressed, samples or folders that do not
      fit, an unwritable folder.
  """
  steps = transform.steps if isinstance(transform, base.Chain) else (transform,)
  out = None if out_folder is None else Path(out_folder).absolute()
  if out is not None:
    _check_out(out, model)
  source = sources.open_source(model)
  base.target_layers(steps[0], steps[0].view(source))
  data = samples_lib.collect(source.config, batches, validation_batches, sentinel=sentinel)
  origin = str(model) if isinstance(model, (str, Path)) else 'memory'
  report: dict[str, Any] = {
      'source': origin, 'model': _about(source.config), 'steps': [], 'layers': [],
      'warnings': [],
      'before': account.of_source(source),
  }
  work_root = None if out is None else _work_folder(out, source, steps, data, statistics)
  try:
    return _run(
        source, steps, data, out, work_root, origin, statistics, report, progress
    )
  except UserError:
    _forget_unbegun(work_root)
    raise


def _about(config: config_lib.ModelConfig) -> dict[str, Any]:
  """What a reader of the report is told of the model."""
  own = {'family': config.family, 'decoder': config.stacks == ('decoder',)}
  moe = config.moe
  return own if moe is None else {**own, 'experts': moe.num_experts, 'choices': moe.top_k}


def _forget_unbegun(work: Path | None) -> None:
  """Removes a folder of work in which no step has begun."""
  if work is not None and not list(work.glob('step_*')):
    shutil.rmtree(work, ignore_errors=True)


def _run(source, steps, data, out, work_root, origin, statistics, report, progress) -> Result:
  plans: list[Any] = []
  report['before']['loss'] = _loss_before(source, data, work_root, progress)
  for i, step in enumerate(steps[:-1]):
    work = None if work_root is None else work_root / f'step_{i}'
    source = _earlier_pass(
        source, step, data, work, origin, plans, progress, report, statistics
    )
    statistics = None  # Of the model as it was; later steps measure what they get.
  work = None if work_root is None else work_root / f'step_{len(steps) - 1}'
  result, entry = _timed_pass(
      source, steps[-1], data, work, out, origin, plans, progress, statistics
  )
  report['layers'] += result.report['rows']
  report['steps'].append(entry)
  _warn(steps, report)
  report['over_budget'] = sorted({
      row['path'].partition('/experts/')[0] for row in report['layers'] if row.get('over_budget')
  })
  report['after'] = account.of_source(sources.open_source(_made(result)))
  report['loss'] = report['after']['loss'] = result.report['loss']
  report['tokens'] = {s: data.calibration_tokens(s) for s in source.config.stacks}
  if out is not None and work_root is not None:
    files.write_json(out / 'report.json', report)
    shutil.rmtree(work_root)
  return dataclasses.replace(result, report=report)


def _warn(steps: Sequence[base.Transform], report: dict[str, Any]) -> None:
  """What steps have to say of what they did goes into the report and to Python's warnings."""
  for step in steps:
    own = [row for row in report['layers'] if row['transform'] == step.name]
    if said := step.caution(own):
      report['warnings'].append(said)
      warnings.warn(said, stacklevel=4)


def _loss_before(source, data, work, progress) -> float | None:
  """The validation loss of the model as it is; found once for all resumes."""
  if not data.validation:
    return None
  file = None if work is None else work / 'loss_before.json'
  if file is not None and file.is_file():
    return files.read_json(file)['loss']
  walked = walker.Walk(source, data.tail(), progress=progress)
  walked.run()
  if file is not None:
    files.write_json(file, {'loss': walked.loss})
  return walked.loss


def _made(result: Result) -> Model | Path:
  made = result.model if result.folder is None else result.folder
  assert made is not None
  return made


def _timed_pass(source, step, data, work, target, origin, plans, progress, statistics=None):
  started = time.monotonic()
  result = _run_pass(source, step, data, work, target, origin, plans, progress, statistics)
  return result, {
      'transform': step.name, 'settings': step.describe(),
      'seconds': time.monotonic() - started, 'peak_host_bytes': _peak_bytes(),
  }


def _earlier_pass(
    source, step, data, work, origin, plans, progress, report, statistics
) -> Any:
  """A step of a chain before the last; returns the model it made, as a source."""
  target = None if work is None else work / 'model'
  if target is not None and (work / 'done.json').is_file():
    done = files.read_json(work / 'done.json')
    made: Any = target
    plans.append(done['plan'])
  else:
    result, entry = _timed_pass(
        source, step, data, work, target, origin, plans, progress, statistics
    )
    done = {'rows': result.report['rows'], 'plan': plans[-1], 'step': entry}
    made = _made(result)
    if work is not None:
      files.write_json(work / 'done.json', done)
  report['layers'] += done['rows']
  report['steps'].append(done['step'])
  return sources.open_source(made)


def _peak_bytes() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _check_out(out: Path, model: Model | str | Path) -> None:
  """What would stop the last step must not wait for it."""
  if not isinstance(model, Model) and out.resolve() == Path(model).resolve():
    raise UserError(f'{out} is the model itself: name another folder to write to')
  files.require_target(out)


def _work_folder(
    out: Path, source: Any, steps: Sequence[base.Transform], data: Any,
    statistics: stats.Statistics | None,
) -> Path:
  """The folder of unfinished work for exactly this job; another job's leftovers are removed."""
  work = out.with_name(f'.{out.name}.compressing')
  job = hashlib.sha256(json.dumps({
      'format': FORMAT, 'source': source.fingerprint(), 'data': data.fingerprint(),
      'config': config_lib.to_json(source.config), 'steps': [step.describe() for step in steps],
      'statistics': None if statistics is None else statistics.fingerprint(),
  }, sort_keys=True).encode()).hexdigest()
  try:
    if work.exists() and (
        not (work / 'job.json').is_file() or files.read_json(work / 'job.json').get('job') != job
    ):
      shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    files.write_json(work / 'job.json', {'job': job})
  except OSError as error:
    raise files.os_error(work, error) from error
  return work


def _run_pass(source, step, data, work, target, origin, plans, progress, statistics) -> Result:
  """One transform over the whole model, then the model written."""
  source = step.view(source)
  targets = base.target_layers(step, source)
  plan = _plan(source, step, data, work, progress, statistics)
  plans.append(plan)
  walked = walker.Walk(
      source, data, step=step, plan=plan, work=work, targets=targets, progress=progress
  )
  walked.run()
  config = step.settle(step.reconfigure(source.config, plan), walked.rows)
  leaves = _leaves(source, walked)
  report = {'rows': walked.rows, 'loss': walked.loss}
  states = {stack: acts.buffer for stack, acts in walked.stacks.items()}
  if target is None:
    flat = {path: jax.tree.map(jnp.asarray, leaf) for path, leaf in leaves}
    made = Model(config, tree.unflatten(flat))
    return Result(model=made, folder=None, report=report, states=states)
  provenance: dict[str, Any] = {'source': origin, 'compression': [step.describe()]}
  folder = getattr(source, 'folder', None)
  if folder is not None:
    earlier = source.manifest.get('provenance') or {}
    provenance |= {name: earlier[name] for name in ('trained',) if name in earlier}
  store.save_folder(
      target, config, leaves, provenance=provenance, plan=plans, tokenizer_from=folder,
      expected_paths=_expected_names(source, walked),
  )
  return Result(model=None, folder=target, report=report, states=states)


def _plan(source, step, data, work, progress, statistics) -> dict[str, Any]:
  """The step's plan; a resumed run reads that of the first."""
  file = None if work is None else work / 'plan.json'
  if file is not None and file.is_file():
    return files.read_json(file)
  kinds = step.statistics()
  if kinds and statistics is None:
    held = None if work is None else work / 'statistics.npz'
    walked = tuple(kind for kind in kinds if kind != 'gradients')
    statistics = stats.of_samples(source, data, walked, work=held, progress=progress) if (
        walked
    ) else gradients.of_samples(source, data)
    if walked and 'gradients' in kinds:
      statistics = stats.both(statistics, gradients.of_samples(source, data))
  elif kinds and statistics is not None:
    statistics.check(source, kinds, step.name)
  # Through JSON, so that both go on alike.
  plan = json.loads(json.dumps(dict(step.plan(source.config, source, statistics))))
  if file is not None:
    file.parent.mkdir(exist_ok=True)
    files.write_json(file, plan)
  return plan


def _expected_names(source, walked) -> list[str]:
  """Names in the file to come, at least as many: what a node will hold is not known yet."""
  names = []
  for path in source.paths():
    new = '/experts/' in path and path.partition('/experts/')[0] in walked.changed
    names += [f'{path}/{field:16}' for field in range(_MOST_FIELDS)] if new else [path]
  return [*names, *(path for path in walked.leaves if path not in names)]


def _leaves(source, walked):
  """(path, leaf) of the compressed model; one weight's experts are joined at a time."""
  for path in source.paths():
    layer, found, name = path.partition('/experts/')
    if found and name in walked.changed.get(layer, ()):
      yield path, _joined(walked, layer, name)
    else:
      yield path, walked.leaves[path] if path in walked.leaves else source.read(path)
  there = set(source.paths())
  for layer, names in sorted(walked.changed.items()):
    for name in sorted(names):
      if (path := f'{layer}/experts/{name}') not in there:
        yield path, _joined(walked, layer, name)
  yield from ((path, leaf) for path, leaf in walked.leaves.items() if path not in there)


def _joined(walked, layer, name):
  return parts.join(
      part for group in walked.groups(layer) for part in group.parts.get(name, ())
  )
