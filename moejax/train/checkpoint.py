"""Checkpoints of a run: orbax arrays with a manifest beside them, atomic and asynchronous.

To resume: (1) build the abstract state for this run's config and mesh, (2) read the newest manifest
and compare the configs, (3) restore the arrays straight into the new shardings, (4) continue at
the manifest's data index.
"""

from collections.abc import Callable
import contextlib
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from moejax import config as config_lib
from moejax import errors, files
from moejax.train import state as state_lib

# What shapes the params or the optimizer's state.
_FIXED = ('model', 'optim.optimizer', 'data.num_sentinels', 'train.scan_layers', 'low_rank')
_UNFINISHED = '.orbax-checkpoint-tmp'  # how the name of an unfinished checkpoint ends


def differences(old: Any, new: Any, where: str = '') -> dict[str, tuple[Any, Any]]:
  """Maps the path of each differing JSON value to (old, new)."""
  if isinstance(old, dict) and isinstance(new, dict):
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted({*old, *new}):
      path = f'{where}.{name}' if where else name
      found.update(differences(old.get(name), new.get(name), path))
    return found
  return {} if old == new else {where: (old, new)}


def check_same_run(old: dict, new: dict, folder: str | os.PathLike) -> list[str]:
  """Names the settings that changed since the checkpoint; those that may not raise UserError."""
  with contextlib.suppress(errors.UserError):  # settings that it knew nothing of are as they were
    old = config_lib.to_json(config_lib.from_json(config_lib.Experiment, old))
  changed = differences(old, new)
  still = [_untrained(values) for values in (old, new)]
  if still[0] != still[1]:
    raise errors.UserError(
        f'{folder} holds a run whose optim.learning_rate_rules keep {still[0]} as they are, the '
        f'config says {still[1]}; use another --workdir or restore the setting'
    )
  for path, (was, now) in changed.items():
    if any(path == fixed or path.startswith(fixed + '.') for fixed in _FIXED):
      raise errors.UserError(
          f'{folder} holds a run with {path} = {was!r}, the config says {now!r}; use another '
          '--workdir or restore the setting'
      )
  return [f'{path}: {was!r} -> {now!r}' for path, (was, now) in changed.items()]


def _untrained(experiment: dict) -> list[str]:
  """The patterns of what is not trained, and so has no place in the optimizer's state."""
  rules = (experiment.get('optim') or {}).get('learning_rate_rules') or ()
  return [pattern for pattern, factor in rules if factor == 0]


def any_in(folder: pathlib.Path) -> bool:
  """Whether a folder holds a whole checkpoint."""
  return any(path.name.isdigit() for path in folder.glob('*')) if folder.is_dir() else False


class Checkpoints:
  """The checkpoints below a folder, newest `keep` of them."""

  def __init__(self, folder: str | os.PathLike, experiment: config_lib.Experiment, keep: int = 2):
    self.folder = pathlib.Path(folder).absolute()
    self._experiment = config_lib.to_json(experiment)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=max(keep, 1), create=True, cleanup_tmp_directories=True,
        step_format_fixed_length=8, enable_async_checkpointing=True,
    )
    try:
      self._manager = ocp.CheckpointManager(
          self.folder, options=options, item_names=('state', 'manifest')
      )
    except OSError as error:
      raise files.os_error(self.folder, error) from error

  def latest(self) -> int | None:
    """Step of the newest whole checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, state: state_lib.TrainState, step: int, data_index: int) -> None:
    """Starts writing a checkpoint; the caller may donate `state` to the next step right away."""
    manifest = {
        'format': 1,
        'step': step,
        'data_index': data_index,
        'experiment': self._experiment,
        'jax': jax.__version__,
    }
    if jax.default_backend() == 'cpu':
      # Host arrays would be written in place by the next, donating, step.
      state = jax.tree.map(jnp.copy, state)
    self._guard(
        lambda: self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), manifest=ocp.args.JsonSave(manifest)
            ),
        )
    )

  def restore(
      self, target: state_lib.TrainState, step: int | None = None
  ) -> tuple[state_lib.TrainState, int, list[str]]:
    """Reads a checkpoint (default: the newest) onto any mesh.

    Args:
      target: ShapeDtypeStructs with the shardings wanted.

    Returns:
      (state, data index, settings that changed since).

    Raises:
      UserError: there is none, it is broken, or it belongs to another model.
    """
    step = self.latest() if step is None else step
    if step is None:
      raise errors.UserError(f'no checkpoint in {self.folder}')
    try:
      manifest = self._manager.restore(
          step, args=ocp.args.Composite(manifest=ocp.args.JsonRestore())
      ).manifest
      written, data_index = manifest['experiment'], int(manifest['data_index'])
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise self._broken(step, error) from error
    changed = check_same_run(written, self._experiment, self.folder)
    try:
      restored = self._manager.restore(
          step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
      )
    except (OSError, ValueError, KeyError) as error:
      raise self._broken(step, error) from error
    return restored.state, data_index, changed

  def _broken(self, step: int, error: Exception) -> errors.UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if 'tree structures do not match' in str(error):
      return errors.UserError(
          f'checkpoint {self.folder / f"{step:08d}"} holds other arrays than this run has: it was '
          'written with other settings or by an older version; use another --workdir'
      )
    return errors.UserError(
        f'checkpoint {self.folder / f"{step:08d}"} cannot be read ({reason[:200]}); '
        'remove that folder to resume from an older one'
    )

  def wait(self) -> None:
    """Blocks until what was saved is on disk; raises UserError if that failed."""
    self._guard(self._manager.wait_until_finished)

  def close(self) -> None:
    """Waits as `wait` does; nothing can be saved after it."""
    self._guard(self._manager.close)

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind, *_) -> None:
    """Closes. After an error, which is the one to tell, what is being saved is finished first."""
    if kind is None:
      self.close()
    elif jax.process_count() == 1:  # several would wait for one another
      with contextlib.suppress(Exception):
        self.close()

  def _guard(self, action: Callable[[], Any]) -> None:
    try:
      action()
    except Exception as error:  # orbax and tensorstore wrap the system's error in many ways
      failed = files.no_room(self.folder, error)
      if failed is None and isinstance(error, OSError):
        failed = files.os_error(self.folder, error)
      if failed is None:
        raise
      for unfinished in self.folder.glob(f'*{_UNFINISHED}'):
        shutil.rmtree(unfinished, ignore_errors=True)
      raise failed from error


def target_of(abstract: state_lib.TrainState, places: state_lib.TrainState) -> Any:
  """ShapeDtypeStructs with shardings, for `Checkpoints.restore`."""
  return jax.tree.map(
      lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), abstract, places
  )

