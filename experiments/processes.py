"""Joining a run of several processes: told by flags, or found out from where the process runs."""

from collections.abc import Mapping
import importlib.util
import os
import pathlib

from absl import flags
import jax

from moejax.errors import UserError

_DISTRIBUTED = flags.DEFINE_bool(
    'distributed', None,
    'Join a run of several processes. Without it that is found out: from JAX_COORDINATOR_ADDRESS, '
    'JAX_NUM_PROCESSES and JAX_PROCESS_ID, from Slurm (srun), or on a TPU VM.'
)
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'host:port of the first process.')
_PROCESSES = flags.DEFINE_integer(
    'processes', None, 'Number of processes of the run.', lower_bound=1
)
_PROCESS = flags.DEFINE_integer('process', None, 'Which of them this is, from 0.', lower_bound=0)
_HEARTBEAT = flags.DEFINE_integer(
    'heartbeat_seconds', 100, 'A process that is silent for so long ends the run.', lower_bound=10
)
_NAMES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')


def number(env: Mapping[str, str], name: str) -> int | None:
  """A whole number from the environment; UserError if it is something else."""
  value = env.get(name)
  if value is not None and not value.isdigit():
    raise UserError(f'{name}={value!r} in the environment: a whole number')
  return None if value is None else int(value)


def several_by_slurm(env: Mapping[str, str]) -> bool:
  """Whether srun started this process as one of several."""
  known = 'SLURM_STEP_NODELIST' in env and 'SLURM_PROCID' in env
  return known and (number(env, 'SLURM_NTASKS') or 1) > 1


def on_tpu_vm(device_folder: str = '/dev') -> bool:
  """Whether this machine has a TPU and the library for it; its metadata names the others."""
  chips = [*pathlib.Path(device_folder).glob('accel*'), *pathlib.Path(device_folder).glob('vfio/*')]
  wanted = os.environ.get('JAX_PLATFORMS', 'tpu')
  return bool(chips) and 'tpu' in wanted and importlib.util.find_spec('libtpu') is not None


def join() -> None:
  """Becomes one process of several where the flags or the surroundings say so.

  Raises:
    UserError: flags or environment that contradict each other, or no answer from the others.
  """
  address, count, own = _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
  if _DISTRIBUTED.value is False:
    return
  found = None
  if address is None and _NAMES[0] in os.environ:
    address, count, own = os.environ[_NAMES[0]], *(number(os.environ, n) for n in _NAMES[1:])
    found = _NAMES[0]
  elif several_by_slurm(os.environ):
    found = 'Slurm'
  elif on_tpu_vm():
    found = 'this TPU VM'
  if not (_DISTRIBUTED.value or found or address or count is not None or own is not None):
    return
  if count is not None and own is not None and own >= count:
    raise UserError(f'process {own} of {count}: the first one is 0, the last one {count - 1}')
  try:
    jax.distributed.initialize(
        address, count, own, heartbeat_timeout_seconds=_HEARTBEAT.value
    )
  except (ValueError, RuntimeError) as error:
    reason = str(error).partition('\n')[0]
    raise UserError(
        f'{found or "--distributed"}: {reason} Give --coordinator, --processes and --process, the '
        'same coordinator everywhere, or --nodistributed to run alone'
    ) from error
