"""Compiles the kernels' cases for one chip and prints their schedules as JSON.

A process of its own: the compiler's dump has to be asked for before JAX starts.

Example:
  python -m experiments.schedules.compile v6e
"""

import json
import os
import pathlib
import sys
import tempfile
from typing import Any

_DUMP = tempfile.TemporaryDirectory(prefix='moejax_schedules_')
if __name__ == '__main__':
  os.environ['LIBTPU_INIT_ARGS'] = ' '.join([
      f'--xla_jf_dump_to={_DUMP.name} --xla_jf_dump_llo_text=true',
      os.environ.get('LIBTPU_INIT_ARGS', ''),
  ])
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ.pop('XLA_FLAGS', None)  # The TPU compiler ends a process for a flag it does not know.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # Nothing is run on the chips.

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from experiments.schedules import dump
from kernels_pallas.grouped_matmul import cases as grouped_matmul
from kernels_pallas.lowrank_sparse_matmul import cases as lowrank_sparse_matmul
from kernels_pallas.neuron_select import cases as neuron_select
from kernels_pallas.packed_matmul import cases as packed_matmul
from kernels_pallas.subbit_matmul import cases as subbit_matmul
from kernels_pallas.ternary_matmul import cases as ternary_matmul

CHIPS = {'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2'}
KERNELS = {
    'ternary_matmul': ternary_matmul.scheduled, 'subbit_matmul': subbit_matmul.scheduled,
    'packed_matmul': packed_matmul.scheduled,
    'gmm': grouped_matmul.scheduled,
    'lowrank_sparse_project': lowrank_sparse_matmul.scheduled_project,
    'lowrank_sparse_expand': lowrank_sparse_matmul.scheduled_expand,
    'neuron_select': neuron_select.scheduled,
}
TILE = 2048 * 512  # Weights that figures are given for.


def measure(chip: str, part: str = '') -> dict[str, dict[str, Any]]:
  """kernel -> case -> {'bundles', 'spills', 'a_tile': bundles for 2048 x 512 weights}.

  part: of the cases that have it in their name.
  """
  topology = topologies.get_topology_desc(platform='tpu', topology_name=CHIPS[chip])
  one_chip = NamedSharding(Mesh(np.array(topology.devices[:1]), ('chip',)), PartitionSpec())
  folder = pathlib.Path(_DUMP.name)
  made: dict[str, dict[str, Any]] = {}
  for kernel, cases in KERNELS.items():
    made[kernel] = {}
    for case in cases():
      if part not in case.name:
        continue
      before = set(os.listdir(folder))
      jax.jit(case.function, in_shardings=one_chip).lower(*case.structs).compile()
      found = dump.schedules(folder, set(os.listdir(folder)) - before)
      schedule = found[kernel]
      made[kernel][case.name] = {
          'bundles': schedule.bundles, 'spills': schedule.spills,
          'a_tile': round(schedule.run(case.trips) * TILE / case.step_weights),
      }
  return made


if __name__ == '__main__':
  json.dump(measure(*sys.argv[1:]), sys.stdout)
