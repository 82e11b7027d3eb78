"""Meshes, and golden files of where every parameter lives."""

import dataclasses
import pathlib

import jax
import pytest

from moejax import config as config_lib
from moejax import model, presets, sharding
from moejax.errors import UserError

GOLDEN = pathlib.Path(__file__).parent / 'golden'


PRESETS = ('switch-base-8', 't5-v1_1-small', 'grin-moe', 'qwen1.5-moe-a2.7b')


@pytest.mark.parametrize('name', PRESETS)
def test_golden_shardings(name, request):
  """Run with `--update-golden` after a wanted change, and read the diff."""
  mesh = sharding.make_mesh(config_lib.MeshConfig(data=2, expert=2, tensor=2))
  config = presets.preset(name)
  if isinstance(config, config_lib.DecoderConfig):
    config = dataclasses.replace(config, num_layers=1)  # All its layers lie alike.
  lines = sharding.describe(model.abstract_params(config), mesh)
  path = GOLDEN / f'{name}.txt'
  if request.config.getoption('--update-golden'):
    path.parent.mkdir(exist_ok=True)
    path.write_text('\n'.join(lines) + '\n')
  assert path.read_text().splitlines() == lines


def test_axes_that_do_not_divide_stay_whole():
  mesh = sharding.make_mesh(config_lib.MeshConfig(data=8))
  params = {'a': {'ffn': {'wi': jax.ShapeDtypeStruct((12, 16), 'float32')}}}
  spec = sharding.param_specs(params, mesh)
  assert tuple(spec['a']['ffn']['wi']) == (None, 'tensor')


def test_too_few_devices_says_how_many():
  with pytest.raises(UserError, match='needs 16 devices, found 8'):
    sharding.make_mesh(config_lib.MeshConfig(data=4, expert=4))
  with pytest.raises(UserError, match='expert=16'):
    sharding.make_mesh(config_lib.MeshConfig(expert=16))


def test_data_axis_takes_what_is_left():
  mesh = sharding.make_mesh(config_lib.MeshConfig(expert=2))
  assert dict(mesh.shape) == {'pipeline': 1, 'data': 4, 'expert': 2, 'tensor': 1}
  assert sharding.batch_ways(mesh) == 8 and sharding.batch_ways(None) == 1
