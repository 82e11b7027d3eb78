"""Stacked layers: the same model, run by one program for all layers that are alike."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config as config_lib
from moejax import model, sharding
from moejax.nn import blocks, stacking

CONFIG = config_lib.EncDecConfig(
    vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_heads=4, num_layers=4, num_decoder_layers=2,
    dropout_rate=0.1,
    moe=config_lib.EncDecMoeConfig(num_experts=4, encoder_sparse_step=2, decoder_sparse_step=1),
)


@functools.cache
def params(config=CONFIG):
  rng = np.random.default_rng(0)
  draw = lambda a: jnp.asarray(rng.normal(0.0, 0.3, a.shape), a.dtype)
  return jax.tree.map(draw, model.abstract_params(config))


def batch():
  tokens = jax.random.randint(jax.random.key(1), (4, 11), 2, 64)
  return {'encoder_tokens': tokens, 'decoder_tokens': tokens[:, :7]}


def test_layers_repeat_by_their_kinds():
  assert [stacking.period(CONFIG, stack) for stack in ('encoder', 'decoder')] == [2, 1]


def test_unstacking_gives_back_every_array():
  got = stacking.unstack(stacking.stack(params(), CONFIG), CONFIG)
  jax.tree.map(np.testing.assert_array_equal, got, params())


def test_shapes_stack_as_arrays_do():
  shapes = stacking.stack(model.abstract_params(CONFIG), CONFIG)
  arrays = jax.eval_shape(lambda p: stacking.stack(p, CONFIG), params())
  assert shapes == arrays


@pytest.mark.long
def test_an_encoder_decoder_is_the_same_stacked_and_sharded():
  def loss(p, mesh, remat):
    output = model.forward(CONFIG, p, batch(), mesh=mesh, remat=remat, keep_states=True)
    balance = sum(r.load_balance_loss for r in output.routings.values())
    return jnp.mean(output.logits_btv**2) + balance, output

  run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(1, 2))
  (_, want), want_grads = run(params(), None, False)
  mesh = sharding.make_mesh(config_lib.MeshConfig(data=2, expert=2, tensor=2))
  stacked = sharding.place(stacking.stack(params(), CONFIG), mesh)
  wi = stacked['encoder']['blocks']['layer_1']['ffn']['experts']['wi']
  assert wi.shape == (2, 4, 16, 32) and wi.addressable_shards[0].data.shape == (2, 2, 8, 16)
  (_, got), got_grads = run(stacked, mesh, True)
  assert list(got.routings) == list(want.routings)
  assert {name: s.shape for name, s in want.states.items()} == {
      'encoder': (4, 4, 11, 16), 'decoder': (2, 4, 7, 16)}
  np.testing.assert_array_equal(want.states['encoder'][-1], want.encoder_bsd)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, want)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-9),
      stacking.unstack(got_grads, CONFIG), want_grads,
  )


def test_a_stacked_model_draws_in_training_alone():
  config = dataclasses.replace(CONFIG, family='t5', moe=None)
  run = jax.jit(lambda p, key: model.forward(config, p, batch(), key=key).logits_btv)
  stacked = stacking.stack(params(config), config)
  quiet, one, other = (run(stacked, key) for key in (None, jax.random.key(2), jax.random.key(3)))
  assert len({np.asarray(a).tobytes() for a in (quiet, one, other)}) == 3


def test_each_layer_has_its_own_key():
  run = lambda j, p, x, context, key: (x, jax.random.key_data(key))
  step, key = 2, jax.random.key(0)
  stacked = {f'layer_{j}': jnp.zeros((3, 1)) for j in range(step)}
  _, keys, _ = blocks.scan(step, stacked, jnp.zeros(1), None, key, run)
  for layer in range(6):
    want = jax.random.key_data(jax.random.fold_in(key, layer))
    np.testing.assert_array_equal(keys[layer % step][layer // step], want)
