r"""Trains a model as a config file says, or goes on where the workdir's last checkpoint stands.

SIGTERM or Ctrl-C saves a checkpoint and ends with exit code 75. Processes of one run find one
another under Slurm and on TPU VMs (`experiments/launch`), or by JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID; they share the workdir.

Example:
  python -m experiments.train --config configs/FILE.py --workdir runs/first \
      --set train.steps=200 --set optim.learning_rate=0.002
"""

import sys

from absl import flags

from experiments import flags as common
from experiments import processes
from moejax import config, files
from moejax.errors import UserError
from moejax.train import host_memory, loop

_STOPPED = 75  # exit code of a run that a signal stopped: run it again to go on

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run: checkpoints, logs, model.')


def main() -> None:
  common.require('config', 'workdir')
  experiment = common.load_config(flags.FLAGS.config, flags.FLAGS.set)
  if not isinstance(experiment, config.Experiment):
    raise UserError(
        f'{flags.FLAGS.config} returns a {type(experiment).__name__}, no training run; try '
        'configs/sotu_switch16.py'
    )
  if host_memory.runs_on_cpu():
    host_memory.keep_freed()
  processes.join()
  stopped = common.stop_on_signals()
  result = loop.run(experiment, str(_WORKDIR.value), should_stop=stopped)
  print(files.json_text(result))
  if stopped() and not result['finished']:
    sys.exit(_STOPPED)


if __name__ == '__main__':
  common.define_config_flags()
  common.run(main, __doc__)
