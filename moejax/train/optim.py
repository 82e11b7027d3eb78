"""The optimizer as one optax chain, built from a config; every parameter is covered by a rule."""

from collections.abc import Callable, Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from moejax import config as config_lib
from moejax import errors, sharding, tree

SCHEDULES = ('constant', 'cosine', 'linear', 'rsqrt', 'wsd')
OPTIMIZERS = ('adamw', 'adafactor', 'muon')


def schedule(config: config_lib.OptimConfig, steps: int) -> Callable[[Any], jax.Array]:
  """Learning rate by step: a linear warm-up, then the named decay to `end_fraction` of the peak.

  'rsqrt' is T5's peak * sqrt(warmup / step) (arXiv 1910.10683, section 3.1.2) and has no end.

  Raises:
    UserError: unknown name, or a warm-up and decay that do not fit into `steps`.
  """
  name, peak, warmup = config.schedule, config.learning_rate, config.warmup_steps
  if name not in SCHEDULES:
    raise errors.UserError(
        f'optim.schedule = {name!r}: one of {SCHEDULES}{errors.did_you_mean(name, SCHEDULES)}'
    )
  decay = config.decay_steps if name == 'wsd' else steps - warmup
  if name in ('cosine', 'linear', 'wsd') and (decay < 1 or warmup + decay > steps):
    raise errors.UserError(
        f'optim.warmup_steps = {warmup} and a decay of {decay} steps do not fit into '
        f'train.steps = {steps}'
    )

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    warm = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
    left = jnp.clip((steps - step) / max(decay, 1), 0.0, 1.0)
    if name == 'constant':
      factor = jnp.float32(1.0)
    elif name == 'rsqrt':
      factor = jnp.sqrt(max(warmup, 1) / jnp.maximum(step + 1, max(warmup, 1)))
    else:
      shape = 0.5 - 0.5 * jnp.cos(jnp.pi * left) if name == 'cosine' else left
      factor = config.end_fraction + (1.0 - config.end_fraction) * shape
    return peak * warm * factor

  return rate


def by_rules(rules, params: Any, field: str) -> Any:
  """A tree of the values of the first rule that matches each path.

  Raises:
    UserError: a parameter matches no rule; the message names it and the field.
  """

  def value(path, _):
    try:
      return tree.first_match(rules, path)
    except errors.UserError as error:
      raise errors.UserError(f'{field}: {error}') from None

  return tree.map_paths(value, params)


def split_trained(
    config: config_lib.OptimConfig, params: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Leaves that are trained, and those that are not: no floats, or at a learning rate of 0.

  What is not trained has no gradient and no place in the optimizer's state.
  """
  floats, fixed = tree.split_floats(params)
  if not any(factor == 0 for _, factor in config.learning_rate_rules):
    return floats, fixed
  rates = tree.flatten(by_rules(config.learning_rate_rules, floats, 'optim.learning_rate_rules'))
  trained: dict[str, Any] = {}
  still = tree.flatten(fixed)
  for path, leaf in tree.flatten(floats).items():
    (trained if rates[path] else still)[path] = leaf
  if not trained:
    raise errors.UserError('optim.learning_rate_rules keep every parameter as it is')
  return tree.unflatten(trained), tree.unflatten(still)


def decay_and_scale(
    decay: float, decay_factors: Any, rate_factors: Any
) -> optax.GradientTransformation:
  """(update + decay * decay factor * parameter) * rate factor (arXiv 1711.05101); stateless."""

  def one(u, p, d, r):
    u = u + (decay * d) * p.astype(u.dtype) if decay * d else u
    return u * r if r != 1.0 else u

  def update(updates, state, params=None):
    return jax.tree.map(one, updates, params, decay_factors, rate_factors), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(
    config: config_lib.OptimConfig, steps: int, params: Any
) -> optax.GradientTransformation:
  """Builds the chain: clip by global norm, precondition, decay weights, scale by rate and rules.

  Args:
    config: what to build. steps: length of the run, for the schedule.
    params: the parameters or their shapes; only paths and ranks are read.

  Raises:
    UserError: unknown optimizer or schedule, or a parameter that no rule covers.
  """
  params, _ = split_trained(config, params)
  decay_factors = by_rules(config.weight_decay_rules, params, 'optim.weight_decay_rules')
  rate_factors = by_rules(config.learning_rate_rules, params, 'optim.learning_rate_rules')
  relative = config.scale_by_param_rms or config.optimizer == 'adafactor'
  # Every stage is there, on or off: these settings may change between a checkpoint and its resume.
  return optax.chain(
      _clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity(),
      _preconditioner(config, params),
      _each_layer(optax.scale_by_param_block_rms()) if relative else optax.identity(),
      decay_and_scale(config.weight_decay, decay_factors, rate_factors),
      optax.scale_by_learning_rate(schedule(config, steps)),
  )


def _clip_by_global_norm(most: float) -> optax.GradientTransformation:
  """optax's, by `tree.norm`."""

  def update(updates, state, params=None):
    del params
    factor = most / jnp.maximum(tree.norm(updates), most)
    return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _each_layer(transform: optax.GradientTransformation) -> optax.GradientTransformation:
  """A stateless transform of arrays by their RMS, for which each stacked layer is its own array."""

  def update(updates, state, params=None):
    given = tree.flatten(updates if params is None else params)

    def one(path, u):
      run = lambda u, p: transform.update(u, state, p)[0]
      return jax.vmap(run)(u, given[path]) if sharding.STACKED in path else run(u, given[path])

    return tree.map_paths(one, updates), state

  return optax.GradientTransformation(transform.init, update)


def _preconditioner(config: config_lib.OptimConfig, params: Any) -> optax.GradientTransformation:
  adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
  if config.optimizer == 'adamw':
    return adam
  if config.optimizer == 'adafactor':
    # arXiv 1804.04235 as T5 uses it: factored second moment, updates clipped at RMS 1, and (in
    # `make_optimizer`) rates relative to the RMS of the parameter, so that 1e-2 is usual.
    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=128),
        _each_layer(optax.clip_by_block_rms(1.0)),
    )
  if config.optimizer == 'muon':
    labels = tree.map_paths(lambda path, _: 'muon' if _muon_axes(path) else 'adam', params)
    return optax.partition({'muon': _muon(), 'adam': adam}, labels)
  name = config.optimizer
  raise errors.UserError(
      f'optim.optimizer = {name!r}: one of {OPTIMIZERS}{errors.did_you_mean(name, OPTIMIZERS)}'
  )


# (path regex, reduction axes, output axes) of the hidden matrices; other axes are a batch. Stacked
# layers have one more before them.
_MUON_RULES = (
    (r'.*/ffn/shared/(wi|wo|gate)(/rest)?', ((0,), (1,))),
    (r'.*/experts/(wi|wo|gate)(/rest)?', ((1,), (2,))),
    (r'.*/ffn/(wi|wo|gate)(/rest)?', ((0,), (1,))),
    (r'.*attention/(q|k|v)(/rest)?', ((0,), (1, 2))),
    (r'.*attention/o(/rest)?', ((0, 1), (2,))),
    (r'.*', None),
)


def _muon_axes(path: str) -> Any:
  axes = tree.first_match(_MUON_RULES, path)
  if axes is None or sharding.STACKED not in path:
    return axes
  return tuple(tuple(i + 1 for i in group) for group in axes)


def _muon() -> optax.GradientTransformation:
  """Muon on hidden matrices, each expert its own, update RMS 0.2 as Adam's (arXiv 2502.16982)."""
  is_masked = lambda node: isinstance(node, optax.MaskedNode)

  def axes(updates):
    def one(path, leaf):
      return leaf if is_masked(leaf) else optax.contrib.MuonDimensionNumbers(*_muon_axes(path))

    return tree.map_paths(one, updates)

  def rescale(updates, _):
    def one(path, u):
      if is_masked(u):
        return u
      reduction, output = _muon_axes(path)
      sizes = [math.prod(u.shape[i] for i in group) for group in (reduction, output)]
      return u * (0.2 * max(sizes) ** 0.5)

    return tree.map_paths(one, updates)

  return optax.chain(
      optax.contrib.scale_by_muon(weight_dimension_numbers=axes), optax.stateless(rescale)
  )
