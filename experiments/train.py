r"""Trains a model as a config file says, or goes on where the workdir's last checkpoint stands.

Example:
  python -m experiments.train --config configs/FILE.py --workdir runs/first \
      --set train.steps=200 --set optim.learning_rate=0.002
"""

from absl import flags
import jax

from experiments import flags as common
from moejax import config, files
from moejax.errors import UserError
from moejax.train import loop

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run: checkpoints, logs, model.')
_DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False, 'Join a multi-process run; on TPU and Slurm JAX finds the rest itself.'
)
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'host:port of the first process.')
_PROCESSES = flags.DEFINE_integer(
    'processes', None, 'Number of processes of the run.', lower_bound=1
)
_PROCESS = flags.DEFINE_integer('process', None, 'Which of them this is, from 0.', lower_bound=0)


def join() -> None:
  """Becomes one process of several."""
  count, own = _PROCESSES.value, _PROCESS.value
  if count is not None and own is not None and own >= count:
    raise UserError(f'--process={own}: under --processes={count}, the first one is 0')
  try:
    jax.distributed.initialize(_COORDINATOR.value, count, own)
  except (ValueError, RuntimeError) as error:
    reason = str(error).partition('\n')[0]
    raise UserError(
        f'--distributed: {reason} Give --coordinator, --processes and --process, the same '
        'coordinator everywhere'
    ) from error


def main() -> None:
  common.require('config', 'workdir')
  experiment = common.load_config(flags.FLAGS.config, flags.FLAGS.set)
  if not isinstance(experiment, config.Experiment):
    raise UserError(
        f'{flags.FLAGS.config} returns a {type(experiment).__name__}, no training run; try '
        'configs/sotu_switch16.py'
    )
  if _DISTRIBUTED.value:
    join()
  result = loop.run(experiment, str(_WORKDIR.value), should_stop=common.stop_on_signals())
  print(files.json_text(result))


if __name__ == '__main__':
  common.define_config_flags()
  common.run(main, __doc__)
