"""The training step and the evaluation step as pure functions of (state, batch)."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import optax

from moejax import config as config_lib
from moejax import errors, model, sharding, tree
from moejax.nn import blocks, members
from moejax.routing import estimators
from moejax.routing import losses as losses_lib
from moejax.routing import metrics as metrics_lib
from moejax.routing.types import Routing
from moejax.train import activity, distill, low_rank, optim, spikes
from moejax.train import state as state_lib

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
COMPUTE_DTYPES = ('float32', 'bfloat16')


def cross_entropy(
    logits_btv: jax.Array, targets_bt: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns -log softmax(logits)[target], float32 [b, t] in nats, and where it is the top logit."""
  logits_btv = logits_btv.astype(jnp.float32)
  # A sum whose gradient is a selection, where that of a gather would be a scatter.
  own_btv = targets_bt[..., None] == jnp.arange(logits_btv.shape[-1])[None, None]
  picked = jnp.sum(jnp.where(own_btv, logits_btv, 0.0), axis=-1)
  hit = picked >= jax.lax.stop_gradient(logits_btv).max(axis=-1)
  return jax.nn.logsumexp(logits_btv, axis=-1) - picked, hit


def task_losses(
    logits_btv: jax.Array, targets_bt: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """`cross_entropy`; zeros of a model without a head, whose logits are empty."""
  if logits_btv.shape[-1]:
    return cross_entropy(logits_btv, targets_bt)
  return jnp.zeros(targets_bt.shape), jnp.zeros(targets_bt.shape, bool)


def content_weights(batch: Batch, config: config_lib.ModelConfig, first_sentinel: int) -> jax.Array:
  """Weights with sentinels and ends of texts left out: what is left is text, float32 [b, t]."""
  targets = batch['targets']
  if isinstance(config, config_lib.StackConfig):
    return batch['weights'] * ~jnp.isin(targets, jnp.array(config.eos_ids, targets.dtype))
  return batch['weights'] * ((targets < first_sentinel) & (targets != config.eos_id))


def has_dense_ffns(config: config_lib.ModelConfig) -> bool:
  """Whether a layer of the model has an FFN without experts."""
  return any(len(config.sparse_layers(s)) < config.layers_of(s) for s in config.stacks)


def count_tokens(batch: Batch, config: config_lib.ModelConfig) -> jax.Array:
  """Real tokens that the model reads, both stacks together."""
  if isinstance(config, config_lib.StackConfig):
    return jnp.sum(batch['segments'] > 0)
  return jnp.sum(batch['encoder_tokens'] != config.pad_id) + jnp.sum(batch['weights'])


def forward(
    experiment: config_lib.Experiment,
    params: Any,
    batch: Batch,
    *,
    key: jax.Array | None = None,
    mesh: Mesh | None = None,
    **options: Any,
) -> model.Output:
  """Applies the model to a batch as the run says; with a key in training mode."""
  train = experiment.train
  extra = {}
  params = low_rank.whole(params, experiment.low_rank)
  if isinstance(experiment.model, config_lib.StackConfig):
    extra['microbatches'] = train.pipeline_microbatches
  return model.forward(
      experiment.model, params, batch, key=key, dtype=jnp.dtype(train.compute_dtype), mesh=mesh,
      remat=train.remat and key is not None, **options, **extra,
  )


def routing_metrics(
    config: config_lib.ModelConfig, routings: Mapping[str, Routing], batch: Batch
) -> Metrics:
  """Sums of `routing.metrics` for each layer; microbatches add up.

  Padding counts as routed unless the config keeps it from the experts.
  """
  valid: dict[str, jax.Array | None] = {}
  if config.moe is not None and config.moe.router_ignore_padding_tokens:
    valid = {path: _real_tokens(config, path, batch).reshape(-1) for path in routings}
  return metrics_lib.layer_sums(routings, valid)


def _real_tokens(config: config_lib.ModelConfig, path: str, batch: Batch) -> jax.Array:
  """Where the stack of a layer's path reads real tokens, bool [b, t]."""
  if isinstance(config, config_lib.StackConfig):
    return batch['segments'] > 0
  return batch['encoder_tokens'] != config.pad_id if path.startswith('encoder/') else (
      batch['weights'] > 0
  )


def _finish_routing(metrics: Metrics) -> Metrics:
  """Turns the sums of each layer into means, and adds the means over layers."""
  return metrics_lib.finish_layers(metrics)


def loss_fn(
    experiment: config_lib.Experiment,
    params: Any,
    batch: Batch,
    key: jax.Array,
    *,
    total_weight: jax.Array,
    parts: int = 1,
    mesh: Mesh | None = None,
    teacher: model.Model | None = None,
    step: jax.Array | int = 0,
) -> tuple[jax.Array, Metrics]:
  """Masked cross-entropy plus the weighted router losses, float32.

  Switch adds alpha * load-balancing loss for each sparse layer (arXiv 2101.03961, eq. 4); the
  z-loss is ST-MoE's (arXiv 2202.08906, eq. 5). A layer's loss counts in full, not averaged;
  'pooled' balance is one loss for all layers.

  Args:
    batch: one of `parts` microbatches; `total_weight` is the weight of all of them, so the losses
      and gradients of the microbatches add up to those of the whole batch.
    teacher: whose logits the student is held to, as `experiment.distill` says.
    step: of the run, for the weight of `experiment.activity`.
  """
  if (count := experiment.train.members) > 1:
    experiment = dataclasses.replace(
        experiment, model=members.with_members(experiment.model, count)
    )
    batch, total_weight = members.tile(batch, count), total_weight * count
  plain = teacher is not None and experiment.distill.deterministic
  output = forward(
      experiment, params, batch, key=None if plain else key, mesh=mesh,
      keep_states=teacher is not None and experiment.distill.hidden_weight > 0,
      observe=bool(experiment.activity.form),
  )
  losses, hits = task_losses(output.logits_btv, batch['targets'])
  cross = jnp.sum(losses * batch['weights']) / total_weight
  balance = balance_loss(experiment.model, output.routings, batch) / parts
  z = sum((r.z_loss for r in output.routings.values()), jnp.float32(0)) / parts
  loss, extra = cross, {}
  if teacher is not None:
    how = experiment.distill
    kl, apart = distillation(experiment, teacher, output, batch, total_weight, parts, mesh)
    loss = how.task_weight * cross + how.weight * kl
    extra['distillation'] = kl
    if apart is not None:
      loss = loss + how.hidden_weight * apart
      extra['hidden'] = apart
  if output.activity is not None:
    push = activity.loss(experiment.activity, output.activity) / parts
    loss = loss + activity.weight(experiment.activity, step) * push
    extra['activity'] = push
    extra['active_units'] = activity.active(output.activity) / parts
  if experiment.model.moe is not None:
    moe = experiment.model.moe
    loss = loss + moe.router_aux_loss_coef * balance + moe.router_z_loss_coef * z
    loss = loss + score_function_loss(output.routings, losses, batch['weights']) / parts
  metrics = {
      'loss': loss,
      'cross_entropy': cross,
      'load_balance_loss': balance,
      'z_loss': z,
      'accuracy': jnp.sum(hits * batch['weights']) / total_weight,
      **extra,
      **routing_metrics(experiment.model, output.routings, batch),
  }
  return loss, metrics


def distillation(
    experiment: config_lib.Experiment, teacher: model.Model, output: model.Output, batch: Batch,
    total_weight: jax.Array, parts: int, mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array | None]:
  """`distill.logit_loss` of a microbatch, as its part of the loss of the whole batch.

  And, where states are kept, `distill.hidden_loss`; microbatches have its mean.
  """
  theirs = jax.lax.stop_gradient(model.forward(
      teacher.config, teacher.params, batch, dtype=jnp.dtype(experiment.train.compute_dtype),
      mesh=mesh, keep_states=output.states is not None,
  ))
  how, apart = experiment.distill, None
  kl = jnp.float32(0) if not output.logits_btv.shape[-1] else distill.logit_loss(
      output.logits_btv, theirs.logits_btv, batch['weights'], temperature=how.temperature,
      reduction=how.reduction, symmetric=how.symmetric,
  )
  if output.states is not None and theirs.states is not None:
    ours = list(output.states.values())
    apart = distill.hidden_loss(ours, list(theirs.states.values()), how.hidden_form) / parts
  if how.reduction == 'published':
    return kl / parts, apart
  return kl * jnp.sum(batch['weights']) / total_weight, apart


def balance_loss(
    config: config_lib.ModelConfig, routings: Mapping[str, Routing], batch: Batch
) -> jax.Array:
  """The load-balancing losses of all layers, added up, or the 'pooled' one of them together."""
  if config.moe is None or not routings:
    return jnp.float32(0)
  if config.moe.balance != 'pooled':
    return sum((r.load_balance_loss for r in routings.values()), jnp.float32(0))
  real = {path: _real_tokens(config, path, batch).reshape(-1) for path in routings}
  return losses_lib.pooled_load_balance_loss(
      [r.logits_me for r in routings.values()], config.moe.top_k, list(real.values())
  )


def score_function_loss(
    routings: Mapping[str, Routing], losses_bt: jax.Array, weights_bt: jax.Array
) -> jax.Array:
  """REINFORCE's term for routers that sample by log-probability, else 0; its value means nothing.

  The reward of a token's draws is the mean loss of its sequence, which they all may have moved; the
  baseline is the mean over the batch.
  """
  sampled = [r.log_prob_m for r in routings.values() if r.log_prob_m is not None]
  if not sampled:
    return jnp.float32(0)
  per_row_b = (losses_bt * weights_bt).sum(1) / jnp.maximum(weights_bt.sum(1), 1.0)
  total = jnp.float32(0)
  for log_prob_m in sampled:
    reward_m = jnp.repeat(per_row_b, log_prob_m.shape[0] // per_row_b.shape[0])
    total += estimators.surrogate_loss(log_prob_m, reward_m, per_row_b.mean())
  return total


def split_batch(batch: Batch, parts: int, mesh: Mesh | None) -> Batch:
  """[b, ...] -> [parts, b / parts, ...], taking every parts-th row so that shards stay put."""

  def split(x):
    rows = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    if mesh is None:
      return rows
    spec = PartitionSpec(None, sharding.BATCH_AXES)
    return jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, spec))

  return {name: split(x) for name, x in batch.items()}


def gradients(
    experiment: config_lib.Experiment, params: Any, batch: Batch, key: jax.Array,
    mesh: Mesh | None, teacher: model.Model | None = None, step: jax.Array | int = 0,
) -> tuple[Any, Metrics]:
  """Gradients and summed metrics of a batch, over `train.accumulate` microbatches in turn.

  Of the leaves that are trained, see `optim.split_trained`.
  """
  params, fixed = optim.split_trained(experiment.optim, params)
  parts = experiment.train.accumulate
  total = jnp.maximum(jnp.sum(batch['weights']), 1.0)

  def one(params, micro, key):
    fn = lambda p: loss_fn(
        experiment, tree.join(p, fixed), micro, key, total_weight=total, parts=parts, mesh=mesh,
        teacher=teacher, step=step,
    )
    (_, metrics), grads = jax.value_and_grad(fn, has_aux=True)(params)
    return grads, metrics

  if parts == 1:
    return one(params, batch, key)
  micro = split_batch(batch, parts, mesh)
  shapes = jax.eval_shape(one, params, jax.tree.map(lambda x: x[0], micro), key)
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

  def body(carry, inputs):
    index, rows = inputs
    new = one(params, rows, jax.random.fold_in(key, index))
    return jax.tree.map(jnp.add, carry, new), None

  return jax.lax.scan(body, zeros, (jnp.arange(parts), micro))[0]


def train_step(
    experiment: config_lib.Experiment,
    optimizer: optax.GradientTransformation,
    state: state_lib.TrainState,
    batch: Batch,
    mesh: Mesh | None = None,
    teacher: model.Model | None = None,
) -> tuple[state_lib.TrainState, Metrics]:
  """One optimizer step; its key is fold_in(key(train.seed), step).

  With `train.on_spike` 'skip' a bad step (see `spikes`) changes nothing but the counter.
  """
  key = jax.random.fold_in(jax.random.key(experiment.train.seed), state.step)
  grads, metrics = gradients(experiment, state.params, batch, key, mesh, teacher, state.step)
  trained, fixed = optim.split_trained(experiment.optim, state.params)
  updates, opt_state = optimizer.update(grads, state.opt_state, trained)
  params = tree.join(optax.apply_updates(trained, updates), fixed)
  metrics = _finish_routing(metrics)
  metrics['grad_norm'] = tree.norm(grads)
  loss, train = metrics['cross_entropy'], experiment.train
  bad = spikes.is_bad(loss, metrics['grad_norm'], state.recent_losses, train.spike_nats)
  if train.on_spike == 'skip':
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(bad, b, a), new, old)
    params, opt_state = keep(params, state.params), keep(opt_state, state.opt_state)
  metrics['bad_steps'] = bad.astype(jnp.float32)
  metrics['tokens'] = count_tokens(batch, experiment.model)
  new = state_lib.TrainState(
      step=state.step + 1, params=params, opt_state=opt_state,
      recent_losses=spikes.remember(state.recent_losses, loss, bad),
  )
  return new, metrics


@jax.jit
def param_norm(params: Any) -> jax.Array:
  """The L2 norm of all weights that are floats, float32 []; reads them all."""
  return tree.norm(tree.split_floats(params)[0])


def eval_step(
    experiment: config_lib.Experiment, params: Any, batch: Batch, mesh: Mesh | None = None, *,
    first_sentinel: int,
) -> Metrics:
  """Sums over a batch, without dropout: divide by `weight` and `content_weight` at the end.

  Of what `train.members` trains it is the ensemble's.

  first_sentinel: the least id that stands for a masked span; a decoder has none.
  """
  content = content_weights(batch, experiment.model, first_sentinel)
  if (count := experiment.train.members) > 1:
    ensemble = dataclasses.replace(
        experiment, model=members.with_members(experiment.model, count)
    )
    tiled = members.tile(batch, count)
    output = forward(ensemble, params, tiled, mesh=mesh)
    logits_btv = members.mean_log_probs(output.logits_btv, count)
  else:
    tiled, output = batch, forward(experiment, params, batch, mesh=mesh)
    logits_btv = output.logits_btv
  losses, hits = task_losses(logits_btv, batch['targets'])
  return {
      'loss': jnp.sum(losses * batch['weights']),
      'accuracy': jnp.sum(hits * batch['weights']),
      'weight': jnp.sum(batch['weights']),
      'content_loss': jnp.sum(losses * content),
      'content_accuracy': jnp.sum(hits * content),
      'content_weight': jnp.sum(content),
      **routing_metrics(experiment.model, output.routings, tiled),
  }


def summarize_eval(sums: Mapping[str, Any]) -> Metrics:
  """Means from the summed `eval_step` metrics of several batches."""
  names = {'loss': 'weight', 'accuracy': 'weight'}
  names |= {'content_loss': 'content_weight', 'content_accuracy': 'content_weight'}
  means = {name: sums[name] / jnp.maximum(sums[weight], 1.0) for name, weight in names.items()}
  return {**means, **_finish_routing({k: v for k, v in sums.items() if '/' in k})}


def check_fits(experiment: config_lib.Experiment, mesh: Mesh) -> None:
  """Raises UserError unless batch, experts and layers divide over microbatches and devices."""
  size, parts = experiment.train.batch_size, experiment.train.accumulate
  stages = mesh.shape['pipeline']
  micro = (experiment.train.pipeline_microbatches or stages) if stages > 1 else 1
  if size % (parts * sharding.batch_ways(mesh) * micro):
    raise errors.UserError(
        f'train.batch_size = {size} must be a multiple of train.accumulate x data x expert x '
        f'pipeline microbatches = {parts} x {mesh.shape["data"]} x {mesh.shape["expert"]} x {micro}'
    )
  if stages > 1 and not experiment.train.scan_layers:
    raise errors.UserError(
        f'mesh.pipeline = {stages} needs stacked layers: set train.scan_layers = true'
    )
  model_config, length = experiment.model, experiment.data.sequence_length
  if isinstance(model_config, config_lib.StackConfig) and length > model_config.max_positions:
    raise errors.UserError(
        f'data.sequence_length = {length} is over the context of the model: raise '
        f'model.max_positions = {model_config.max_positions}'
    )
  if stages > 1:
    if not isinstance(model_config, config_lib.StackConfig):
      raise errors.UserError(f'mesh.pipeline = {stages} is for decoders: set it to 1')
    blocks.check_pipeline(model_config, stages, size // parts, micro)
    if experiment.train.members > 1:
      raise errors.UserError(
          'train.members over 1 needs the rows of an input side by side: set mesh.pipeline = 1'
      )
  if (moe := model_config.moe) is not None:
    field = 'layer_experts' if moe.layer_experts else 'num_experts'
    for experts in moe.layer_experts or (moe.num_experts,):
      if experts % mesh.shape['expert']:
        raise errors.UserError(
            f'moe.{field} = {experts} does not divide over mesh.expert = {mesh.shape["expert"]}'
        )


def jit_train_step(
    experiment: config_lib.Experiment,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    places: state_lib.TrainState,
    teacher: model.Model | None = None,
) -> Any:
  """`train_step` compiled for a mesh: (state, batch) -> (state, metrics).

  The state is donated and kept where `places` says; the teacher, on the mesh, is an argument.
  """
  check_fits(experiment, mesh)

  def step(
      state: state_lib.TrainState, batch: Batch, *teachers: model.Model
  ) -> tuple[state_lib.TrainState, Metrics]:
    return train_step(experiment, optimizer, state, batch, mesh, *teachers)

  step.__name__ = 'train_step'  # What profiles and dumps call the program.
  teachers = () if teacher is None else (teacher,)
  their_places = jax.tree.map(lambda a: a.sharding, teachers)
  jitted = jax.jit(
      step,
      in_shardings=(places, sharding.batch_sharding(mesh), *their_places),
      out_shardings=(places, NamedSharding(mesh, PartitionSpec())),
      donate_argnums=0,
  )
  return jitted if teacher is None else lambda state, batch: jitted(state, batch, teacher)


def jit_eval_step(
    experiment: config_lib.Experiment, mesh: Mesh, places: state_lib.TrainState, *,
    first_sentinel: int,
) -> Callable[[Any, Batch], Metrics]:
  """`eval_step` compiled for a mesh."""
  return jax.jit(
      lambda params, batch: eval_step(
          experiment, params, batch, mesh, first_sentinel=first_sentinel
      ),
      in_shardings=(places.params, sharding.batch_sharding(mesh)),
      out_shardings=NamedSharding(mesh, PartitionSpec()),
  )
