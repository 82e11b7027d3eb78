"""Compiles the training step of one run for a TPU slice and says what a chip needs.

Runs in a process of its own: the compiler writes what it made into a folder that has to be named
before JAX starts.

Example:
  python -m experiments.pods.compile_step --config configs/grin_moe.py:v5p-64 --slice v5p-64
"""

import json
import os
import pathlib
import tempfile
from typing import Any

_DUMP = tempfile.TemporaryDirectory(prefix='moejax_pods_')
if __name__ == '__main__':
  os.environ['XLA_FLAGS'] = (
      f'--xla_dump_to={_DUMP.name} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_train_step'
  )
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # Nothing is run on the chips.

from absl import flags
import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from experiments import flags as common
from experiments.pods import flops as flops_lib
from experiments.pods import hlo, plans
from moejax import errors, sharding
from moejax.data import layout
from moejax.train import optim, state, step, throughput

_SLICE = flags.DEFINE_enum('slice', None, sorted(plans.SLICES), 'For which chips.', required=True)


def devices(topology: str, slices: int) -> list[Any]:
  """The devices of a topology, which need not exist.

  Raises:
    UserError: the TPU compiler is not installed.
  """
  extra = {'num_slices': slices} if slices > 1 else {}
  try:
    described = topologies.get_topology_desc(platform='tpu', topology_name=topology, **extra)
  except (RuntimeError, ImportError) as error:
    raise errors.UserError(
        f'no TPU compiler for {topology}: install libtpu ({str(error).splitlines()[0]})'
    ) from error
  return list(described.devices)


def trace(experiment: Any, mesh: Mesh) -> Any:
  """The training step of an experiment, traced for a mesh from shapes alone."""
  optimizer = optim.make_optimizer(
      experiment.optim, experiment.train.steps, state.abstract_params(experiment)
  )
  abstract = state.abstract(experiment, optimizer)
  places = state.shardings(abstract, mesh)
  batch = layout.batch_spec(experiment.model, experiment.data, experiment.train.batch_size)
  return step.jit_train_step(experiment, optimizer, mesh, places).trace(abstract, batch)


def needs(compiled: Any) -> dict[str, float]:
  """Bytes a chip: what stays (parameters, optimizer, batch), what comes and goes, and both."""
  memory = compiled.memory_analysis()
  kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return {
      'kept_bytes': memory.argument_size_in_bytes, 'temporary_bytes': memory.temp_size_in_bytes,
      'total_bytes': kept + memory.temp_size_in_bytes,
  }


def model_flops(experiment: Any) -> float:
  """Operations of a step that the model asks for, recomputation not counted."""
  batch = layout.batch_spec(experiment.model, experiment.data, experiment.train.batch_size)
  source = batch['encoder_tokens'].shape[1] if 'encoder_tokens' in batch else 0
  return throughput.train_flops(
      experiment.model, experiment.train.batch_size, source, batch['targets'].shape[1]
  )


def count_flops(jaxpr: Any, experiment: Any, chips: int) -> dict[str, float]:
  """Operations a chip under even routing, and with every buffer of the experts full."""
  filled = 1.0
  if experiment.model.moe is not None:
    filled = flops_lib.filled_share(experiment.model.moe.exchange_factor, experiment.mesh.expert)
  return {
      'flops_a_chip': flops_lib.matmul_flops(jaxpr, filled) / chips,
      'flops_of_full_buffers_a_chip': flops_lib.matmul_flops(jaxpr) / chips,
  }


def compile_for(experiment: Any, where: plans.Slice) -> dict[str, Any]:
  """Compiles; returns what a chip needs and does, or why it does not fit."""
  mesh = sharding.make_mesh(experiment.mesh, devices(where.topology, where.slices))
  traced = trace(experiment, mesh)
  result: dict[str, Any] = {
      'mesh': {name: n for name, n in mesh.shape.items() if n > 1},
      'chips': where.chips, 'chip_bytes': int(where.chip_gib * 2**30),
      'samples': experiment.train.batch_size,
      'model_flops_a_chip': model_flops(experiment) / where.chips,
      **count_flops(traced.jaxpr.jaxpr, experiment, where.chips),
  }
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    # A kernel that overflows its own vector memory is a fault, not a chip that is too small.
    if 'RESOURCE_EXHAUSTED' not in str(error) or 'Vmem' in str(error):
      raise
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return {**result, 'fits': False, 'why': lines[0][:300]}
  text = dumped(_DUMP.name)
  if text:
    result['collectives'] = hlo.collectives(text)
  return {**result, **needs(compiled), 'fits': True}


def dumped(folder: str) -> str:
  """The text of the compiled training step in a folder of dumps, '' if there is none."""
  paths = sorted(
      pathlib.Path(folder).glob('*jit_train_step*after_optimizations.txt'),
      key=lambda p: p.stat().st_size,
  )
  return paths[-1].read_text() if paths else ''


def main() -> None:
  if not flags.FLAGS.config:
    raise errors.UserError('--config is missing')
  experiment = common.load_config(flags.FLAGS.config, flags.FLAGS.set)
  print(json.dumps(compile_for(experiment, plans.SLICES[_SLICE.value])), flush=True)


if __name__ == '__main__':
  common.define_config_flags()
  common.run(main)
