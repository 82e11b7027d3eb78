"""Trains a model as a config file says, or goes on where the workdir's last checkpoint stands.

Example:
  python -m experiments.train --config configs/FILE.py --workdir runs/first \
      --set train.steps=200 --set optim.learning_rate=0.002
"""

import json

from absl import flags
import jax

from experiments import flags as common
from moejax.train import loop

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run: checkpoints, logs, model.')
_DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False, 'Join a multi-process run; on TPU and Slurm JAX finds the rest itself.'
)
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'host:port of the first process.')
_PROCESSES = flags.DEFINE_integer('processes', None, 'Number of processes of the run.')
_PROCESS = flags.DEFINE_integer('process', None, 'Which of them this is, from 0.')


def main() -> None:
  common.require('config', 'workdir')
  experiment = common.load_config(flags.FLAGS.config, flags.FLAGS.set)
  if _DISTRIBUTED.value:
    jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  result = loop.run(experiment, str(_WORKDIR.value), should_stop=common.stop_on_signals())
  print(json.dumps(result))


if __name__ == '__main__':
  common.define_config_flags()
  common.run(main, __doc__)
