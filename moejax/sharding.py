"""Meshes and where parameters and batches live on them."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from moejax import tree
from moejax.config import MeshConfig
from moejax.errors import UserError

AXES = ('pipeline', 'data', 'expert', 'tensor')
BATCH_AXES = ('data', 'expert')
# In the path of weights that have layers as their leading axis.
STACKED = '/blocks/'

# First match wins; each entry names the mesh axis of each array axis.
PARAM_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r'.*/experts/(wi|gate)(/rest)?', ('expert', 'data', 'tensor')),
    (r'.*/experts/wo(/rest)?', ('expert', 'tensor', 'data')),
    (r'.*/experts/(wi|gate)/left', ('expert', 'data', None)),
    (r'.*/experts/(wi|gate)/right', ('expert', None, 'tensor')),
    (r'.*/experts/wo/left', ('expert', 'tensor', None)),
    (r'.*/experts/wo/right', ('expert', None, 'data')),
    (r'.*attention/(q|k|v)(/rest)?', ('data', 'tensor', None)),
    (r'.*attention/o(/rest)?', ('tensor', None, 'data')),
    (r'.*attention/(q|k|v)_bias', ('tensor', None)),
    (r'.*/ffn/(wi|gate)(/rest)?', ('data', 'tensor')),
    (r'.*/ffn/wo(/rest)?', ('tensor', 'data')),
    (r'.*/ffn/shared/(wi|gate)(/rest)?', ('data', 'tensor')),
    (r'.*/ffn/shared/wo(/rest)?', ('tensor', 'data')),
    (r'shared/embedding', ('tensor', 'data')),
    (r'(lm_head|pooler)/kernel', ('data', 'tensor')),
    (r'head/transform', ('data', 'tensor')),
    (r'.*', ()),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh with axes pipeline, data, expert, tensor over the given (or all) devices."""
  devices = list(jax.devices() if devices is None else devices)
  fixed = config.pipeline * config.expert * config.tensor
  data = config.data if config.data > 0 else len(devices) // fixed
  need = data * fixed
  if data < 1 or need > len(devices):
    raise UserError(
        f'mesh pipeline={config.pipeline} data={config.data} expert={config.expert} '
        f'tensor={config.tensor} needs '
        f'{max(need, fixed)} devices, found {len(devices)}: lower one of them'
    )
  shape = (config.pipeline, data, config.expert, config.tensor)
  grid = np.asarray(devices[:need]).reshape(shape)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _fit(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """Drops a mesh axis where it does not divide the array axis."""
  fitted = [
      name if name is not None and size % mesh.shape[name] == 0 else None
      for name, size in zip(axes, shape)
  ]
  return PartitionSpec(*fitted)


def param_specs(
    params: Any, mesh: Mesh, rules: Sequence[tuple[str, Sequence[str | None]]] = PARAM_RULES
) -> dict[str, Any]:
  """A PartitionSpec for each array of a params tree (shapes suffice).

  A weight node gives its own tree of specs through `node.specs`. Arrays below the rank of their
  rule, and axes that a mesh axis does not divide, stay replicated.
  """

  def spec(path: str, leaf: Any) -> Any:
    if not tree.is_array(leaf):
      return leaf.specs(mesh)
    axes = tuple(tree.first_match(rules, path))
    if STACKED in path:
      axes = ('pipeline', *(axes or (None,) * (leaf.ndim - 1)))
    return _fit(axes, leaf.shape, mesh) if len(axes) == leaf.ndim else PartitionSpec()

  return tree.map_paths(spec, params)


def param_shardings(params: Any, mesh: Mesh, rules=PARAM_RULES) -> Any:
  """The same as NamedShardings."""
  return jax.tree.map(
      lambda s: NamedSharding(mesh, s),
      param_specs(params, mesh, rules),
      is_leaf=lambda s: isinstance(s, PartitionSpec),
  )


def place(params: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
  """Puts params on a mesh; see `place_leaf`."""
  return tree.map_paths(lambda path, leaf: place_leaf(path, leaf, mesh), params)


def place_leaf(path: str, leaf: Any, mesh: Mesh) -> Any:
  """Puts one array or weight node where `param_specs` says.

  A node on the host is laid out for the mesh first, so that every device holds the codes of its
  own experts only, where the node's class can be cut.
  """
  ways = mesh.shape['expert']
  if not tree.is_array(leaf) and len(leaf.shape) == 3 and leaf.shape[0] % ways == 0:
    leaf = leaf.sharded(ways)
  return jax.device_put(leaf, tree.get(param_shardings({path: leaf}, mesh), path), may_alias=False)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Batches are split over the data and the expert axis."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_ways(mesh: Mesh | None) -> int:
  """Into how many parts a batch is split."""
  return 1 if mesh is None else math.prod(mesh.shape[a] for a in BATCH_AXES)


def _here(mesh: Mesh) -> Any:
  """The mesh as the code around sees it: inside a manual region its abstract form."""
  around = jax.sharding.get_abstract_mesh()
  return mesh if around.empty else around


def constrain(x: jax.Array, mesh: Mesh | None, *axes: Any) -> jax.Array:
  """Asks for x to be split over mesh axes, one entry an array axis."""
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(_here(mesh), PartitionSpec(*axes)))


def constrain_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
  """Keeps the leading axis split over the batch axes."""
  if mesh is None or x.shape[0] % batch_ways(mesh):
    return x
  return constrain(x, mesh, BATCH_AXES)


def manual(fn: Any, mesh: Mesh, *, in_specs: Any, out_specs: Any, axes: Sequence[str] = ()) -> Any:
  """`jax.shard_map` over some mesh axes, also inside another one.

  By default over all that are left: a kernel may run only where no axis is partitioned for it.
  """
  here = _here(mesh)
  names = set(axes) or set(AXES) - set(here.manual_axes)
  return jax.shard_map(
      fn, mesh=here, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False
  )


def gather_whole(x: jax.Array, mesh: Mesh | None) -> jax.Array:
  """Asks for every device to hold all of x, as a table that is looked up needs."""
  return constrain(x, mesh)


def describe(params: Mapping[str, Any], mesh: Mesh) -> list[str]:
  """Lines of `path: dtype[shape] @ spec`, for golden files and logs; a node's arrays by field."""
  specs = jax.tree.leaves(
      param_specs(params, mesh), is_leaf=lambda s: isinstance(s, PartitionSpec)
  )
  lines = []
  for (keys, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(params), specs, strict=True):
    path = jax.tree_util.keystr(keys, simple=True, separator='/')
    lines.append(f'{path}: {leaf.dtype}{list(leaf.shape)} @ {tuple(spec)}')
  return lines
