"""The state of a run: a step counter, the parameters and the optimizer's own arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import optax

from moejax import config as config_lib
from moejax import model, sharding, tree
from moejax.nn import stacking
from moejax.train import low_rank, optim, spikes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """step: int32 scalar, optimizer steps done; params: nested dict; opt_state: optax's tree;
  recent_losses: float32 [w], see `spikes`.

  No random key: the key of a step is fold_in(key(seed), step), so a resumed run is the same run.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  recent_losses: jax.Array


def create(
    experiment: config_lib.Experiment, params: Any, optimizer: optax.GradientTransformation
) -> TrainState:
  """The state before the first step."""
  trained, _ = optim.split_trained(experiment.optim, params)
  return TrainState(
      step=jnp.int32(0), params=params, opt_state=optimizer.init(trained),
      recent_losses=spikes.no_losses(),
  )


def stacks(experiment: config_lib.Experiment) -> bool:
  """Whether a run keeps its layers stacked."""
  return experiment.train.scan_layers


def abstract_params(experiment: config_lib.Experiment) -> Any:
  """Shapes of a run's parameters, as `arranged`."""
  return jax.eval_shape(
      lambda params: arranged(experiment, params), model.abstract_params(experiment.model)
  )


def arranged(experiment: config_lib.Experiment, params: Any) -> Any:
  """A model's parameters as a run has them: split (`low_rank`), and stacked if it stacks them."""
  config: Any = experiment.model
  params = low_rank.split(params, experiment.low_rank, experiment.train.seed)
  return stacking.stack(params, config) if stacks(experiment) else params


def abstract(
    experiment: config_lib.Experiment, optimizer: optax.GradientTransformation
) -> TrainState:
  """The state's shapes and dtypes; nothing is allocated."""
  return jax.eval_shape(
      lambda params: create(experiment, params, optimizer), abstract_params(experiment)
  )


def shardings(state: TrainState, mesh: Mesh) -> TrainState:
  """A NamedSharding for each array: optimizer arrays lie as the parameter they belong to.

  An optimizer array belongs to the parameter whose path ends its own path and whose shape it has,
  or has but for one axis (a factored moment); the others (counts) are replicated.
  """
  specs = tree.flatten(sharding.param_shardings(state.params, mesh))
  shapes = {path: leaf.shape for path, leaf in tree.flatten(state.params).items()}
  replicated = NamedSharding(mesh, PartitionSpec())

  def place(key_path, leaf):
    names = [str(getattr(key, 'key', getattr(key, 'name', None))) for key in key_path]
    path = next((p for p in ('/'.join(names[i:]) for i in range(len(names))) if p in shapes), '')
    shape = shapes.get(path, ())
    if shape == leaf.shape:
      return specs.get(path, replicated)
    for axis in range(len(shape)):
      if shape[:axis] + shape[axis + 1:] == leaf.shape:
        axes = (*specs[path].spec, *(None,) * len(shape))[:len(shape)]
        return NamedSharding(mesh, PartitionSpec(*axes[:axis], *axes[axis + 1:]))
    return replicated

  return jax.tree_util.tree_map_with_path(place, state)


def init(
    experiment: config_lib.Experiment,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    params: Any = None,
) -> TrainState:
  """Makes the state in place on the mesh, from given parameters or from `train.seed`.

  The same seed gives the same parameters on every mesh, stacked or not. Given parameters are those
  of a Model.
  """
  places = shardings(abstract(experiment, optimizer), mesh)
  if params is None:
    make = jax.jit(
        lambda key: arranged(experiment, model.init_params(experiment.model, key)),
        out_shardings=places.params,
    )
    params = make(jax.random.key(experiment.train.seed))
  else:
    params = arranged(experiment, tree.cast_floats(params, jnp.float32))
    params = jax.device_put(params, places.params)
  return jax.jit(lambda p: create(experiment, p, optimizer), out_shardings=places)(params)


def model_params(experiment: config_lib.Experiment, state: TrainState) -> Any:
  """The parameters with layers by themselves, as a Model has them but for what is split."""
  config: Any = experiment.model
  return stacking.unstack(state.params, config) if stacks(experiment) else state.params
