"""E^3: members meet disjoint experts, their mean is what separate passes give, and it trains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax import config as config_lib
from moejax import sharding
from moejax.config import DecoderConfig, DecoderMoeConfig, EncDecConfig, EncDecMoeConfig
from moejax.errors import UserError
from moejax.model import Model, apply_fn
from moejax.nn import members
from moejax.train import optim
from moejax.train import state as state_lib
from moejax.train import step as step_lib

DECODER = DecoderConfig(
    family='mixtral', vocab_size=61, d_model=16, d_head=8, d_ff=24, num_heads=2, num_kv_heads=2,
    num_layers=2, initializer_std=0.3, eos_ids=(1,), max_positions=64,
    moe=DecoderMoeConfig(num_experts=6, top_k=2, router='topk', normalize_gates=True),
)
SWITCH = EncDecConfig(
    vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=2, num_decoder_layers=2,
    dropout_rate=0.0, moe=EncDecMoeConfig(num_experts=6, router_jitter_noise=0.0),
)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(2, 61, (3, 12)).astype(np.int32)


def alone(model, member, of):
  """The model with the routers' columns of one member's experts alone, by hand."""
  size = model.config.moe.num_experts // of
  mine = slice(member * size, (member + 1) * size)
  flat = moejax.tree.flatten(model.params)
  for path in list(flat):
    if path.endswith('router/kernel'):
      flat[path] = flat[path][:, mine]
    elif '/experts/' in path:
      flat[path] = flat[path][mine]
  moe = dataclasses.replace(model.config.moe, num_experts=size)
  return Model(dataclasses.replace(model.config, moe=moe), moejax.tree.unflatten(flat))


@pytest.mark.long(but=('2',))
@pytest.mark.parametrize('count', [2, 3])
def test_the_ensemble_is_the_mean_of_models_with_a_part_of_the_experts(count):
  model = Model.init(DECODER, jax.random.key(0))
  got = moejax.ensemble(model, count)(TOKENS)
  each = [jax.nn.softmax(alone(model, i, count).apply(TOKENS).logits_btv) for i in range(count)]
  np.testing.assert_allclose(np.exp(got), np.mean(each, 0), atol=2e-6)
  np.testing.assert_allclose(np.exp(got).sum(-1), 1, atol=1e-5)


@pytest.mark.long
def test_of_an_encoder_decoder_with_masks():
  model = Model.init(SWITCH, jax.random.key(0))
  mask = np.arange(12)[None] < np.array([12, 7, 3])[:, None]
  got = moejax.ensemble(model, 2)(TOKENS, TOKENS[:, :5], encoder_mask=mask)
  each = [
      jax.nn.softmax(alone(model, i, 2).apply(
          TOKENS, TOKENS[:, :5], encoder_mask=mask).logits_btv)
      for i in range(2)
  ]
  np.testing.assert_allclose(np.exp(got), np.mean(each, 0), atol=2e-6)


def test_members_never_meet():
  model = Model.init(DECODER, jax.random.key(0))
  config = members.with_members(DECODER, 3)
  output = apply_fn(config, model.params, np.repeat(TOKENS, 3, axis=0))
  for routing in output.routings.values():
    choice = np.asarray(routing.choice_mk).reshape(9, -1)
    for row in range(9):
      assert set(choice[row] // 2) == {row % 3}


@pytest.mark.long
@pytest.mark.parametrize('accumulate', [1, 3])
def test_training_is_the_mean_over_members(accumulate):
  run = config_lib.Experiment(
      model=DECODER, optim=config_lib.OptimConfig(learning_rate=3e-3, warmup_steps=0),
      train=config_lib.TrainConfig(batch_size=3, members=2, accumulate=accumulate),
  )
  batch = {
      'tokens': TOKENS, 'targets': np.roll(TOKENS, -1, 1), 'segments': np.ones_like(TOKENS),
      'positions': np.tile(np.arange(12, dtype=np.int32), (3, 1)),
      'weights': np.ones(TOKENS.shape, np.float32),
  }
  optimizer = optim.make_optimizer(run.optim, 30, state_lib.abstract_params(run))
  params = Model.init(DECODER, jax.random.key(0)).params
  state = state_lib.TrainState(
      step=jnp.int32(0), params=params, opt_state=optimizer.init(params),
      recent_losses=jnp.full((16,), jnp.nan),
  )
  step = jax.jit(lambda s: step_lib.train_step(run, optimizer, s, batch))
  new, metrics = step(state)
  own = lambda i: alone(Model(DECODER, params), i, 2).apply(TOKENS).logits_btv
  losses = [
      -np.take_along_axis(
          np.asarray(jax.nn.log_softmax(own(i))), batch['targets'][..., None], -1).mean()
      for i in range(2)
  ]
  assert float(metrics['cross_entropy']) == pytest.approx(np.mean(losses), rel=1e-5)
  assert all(np.isfinite(np.asarray(v)).all() for v in metrics.values())
  assert float(metrics['candidates']) == 3
  looked = step_lib.summarize_eval(
      step_lib.eval_step(run, params, batch, first_sentinel=61)
  )
  log_probs = moejax.ensemble(Model(DECODER, params))(TOKENS)
  want = -np.take_along_axis(np.asarray(log_probs), batch['targets'][..., None], -1).mean()
  assert float(looked['loss']) == pytest.approx(want, rel=1e-5)
  for _ in range(20):
    new, after = step(new)
  assert float(after['cross_entropy']) < float(metrics['cross_entropy'])
  assert moejax.ensemble(Model(DECODER, new.params))(TOKENS).shape == (3, 12, 61)


def test_bad_requests():
  model = Model.init(DECODER, jax.random.key(0))
  for count, words in ((4, 'must divide moe.num_experts = 6'), (6, 'leave moe.top_k = 2 each')):
    with pytest.raises(UserError, match=words):
      moejax.ensemble(model, count)
  with pytest.raises(UserError, match='no experts'):
    members.with_members(dataclasses.replace(DECODER, moe=None), 2)
  piped = config_lib.Experiment(
      model=DECODER, mesh=config_lib.MeshConfig(data=1, pipeline=2),
      data=config_lib.DataConfig(sequence_length=32),
      train=config_lib.TrainConfig(batch_size=8, members=2, scan_layers=True),
  )
  with pytest.raises(UserError, match='mesh.pipeline = 1'):
    step_lib.check_fits(piped, sharding.make_mesh(piped.mesh, jax.devices()[:2]))
  with pytest.raises(UserError, match="not 'sparsemixer_v2'"):
    DecoderMoeConfig(num_experts=4, members=2)
