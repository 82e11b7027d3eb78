"""Dropout of the experts' hidden units: its statistics, and one mask on every mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config as config_lib
from moejax import model, sharding, weights
from moejax.errors import UserError
from moejax.ops import dropout, moe
from moejax.routing import switch

E, D = 8, 16
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)]
SEED = jnp.array([3, 5], jnp.uint32)


def kept(rate, seed=SEED, rows=2000, columns=500):
  out = dropout.drop_rows(jnp.ones((rows, columns)), seed, jnp.arange(rows), rate)
  return np.asarray(out) > 0


@pytest.mark.parametrize('rate', [0.02, 0.1, 0.5, 0.9])
def test_share_kept_in_all_rows_and_columns(rate):
  keep = kept(rate)
  spread = lambda n: np.sqrt(rate * (1 - rate) / n)
  assert abs(keep.mean() - (1 - rate)) < 4 * spread(keep.size)
  for axis in (0, 1):
    share = keep.mean(axis)
    n = keep.shape[axis]
    assert np.abs(share - (1 - rate)).max() < 5 * spread(n)
    # As much spread as independent draws have, not less and not more.
    np.testing.assert_allclose(share.std(), spread(n), rtol=0.15)


def test_masks_are_independent():
  keep = kept(0.5).astype(np.float64) - 0.5
  others = {
      'next row': keep[1:] * keep[:-1],
      'next column': keep[:, 1:] * keep[:, :-1],
      'row 256 on': keep[256:] * keep[:-256],
      'row and column': keep[1:, 1:] * keep[:-1, :-1],
      'transposed': keep[:500] * keep[:500].T,
      'other first word': keep * (kept(0.5, SEED + jnp.array([1, 0], jnp.uint32)) - 0.5),
      'other second word': keep * (kept(0.5, SEED + jnp.array([0, 1], jnp.uint32)) - 0.5),
      'words swapped': keep * (kept(0.5, SEED[::-1]) - 0.5),
  }
  for name, product in others.items():
    assert abs(4 * product.mean()) < 5 / np.sqrt(product.size), name
  # No row repeats another, nor another's mask a few columns on.
  signs = np.sign(keep[:, :64]).astype(np.float32)
  same = signs @ signs.T
  assert np.abs(same - 64 * np.eye(len(same))).max() < 64


def test_scale_and_expectation():
  x = jax.random.normal(jax.random.key(0), (64, 48))
  run = jax.jit(lambda s: dropout.drop_rows(x, s, jnp.arange(64), 0.25))
  draws = np.stack([run(jnp.array([i, 1], jnp.uint32)) for i in range(400)])
  values = np.broadcast_to(np.asarray(x), draws.shape)
  np.testing.assert_allclose(draws[draws != 0], values[draws != 0] / 0.75, rtol=1e-6)
  error = (draws.mean(0) - x) / np.abs(x)
  assert np.abs(error).max() < 5 * np.sqrt(0.25 / 0.75 / 400)
  assert abs(np.asarray(error).mean()) < 5 * np.sqrt(0.25 / 0.75 / 400 / x.size)
  assert dropout.drop_rows(x.astype(jnp.bfloat16), SEED, jnp.arange(64), 0.25).dtype == jnp.bfloat16


def test_a_part_of_the_rows_and_columns_has_the_same_mask():
  x = jax.random.normal(jax.random.key(0), (64, 48))
  whole = dropout.drop_rows(x, SEED, jnp.arange(64), 0.5)
  rows = jnp.array([63, 7, 7, 0])
  part = dropout.drop_rows(x[rows, 16:40], SEED, rows, 0.5, 16)
  np.testing.assert_array_equal(part, whole[rows, 16:40])


def routing(k=1):
  keys = jax.random.split(jax.random.key(1), k)
  parts = [switch.route(jax.random.normal(key, (16, 4, E)), capacity=1) for key in keys]
  join = lambda name: jnp.concatenate([getattr(p, name) for p in parts], axis=1)
  keep = join('keep_mk')
  return dataclasses.replace(
      parts[0], choice_mk=join('choice_mk'), keep_mk=keep, gate_mk=jnp.where(keep, 1.0, 0.0)
  )


def mask(route, shape=None, node=False, rate=0.5, factor=None):
  """The factors on hidden units: experts of 1s pass on what dropout makes of hidden units of 1."""
  mesh = None if shape is None else sharding.make_mesh(
      config_lib.MeshConfig(data=shape[0], expert=shape[1], tensor=shape[2])
  )
  experts = {
      'wi': jnp.full((E, D, D), 1 / D), 'wo': jnp.broadcast_to(jnp.eye(D), (E, D, D))
  }
  if node:
    symbols = np.broadcast_to(2 * np.eye(D, dtype=np.uint8), (E, D, D))
    levels = np.broadcast_to(np.float32([-1, 1]), (E, D, 2))
    experts['wo'] = weights.Ternary.from_symbols(symbols, levels)
  run = jax.jit(lambda x: moe.moe_ffn(
      experts, x, route, 'relu', mesh=mesh, dropout_rate=rate, dropout_key=jax.random.key(2),
      exchange_factor=factor,
  )[0])
  x = jnp.ones((16, 4, D))
  compiled = run.lower(x).compile(compiler_options={'xla_backend_optimization_level': '0'})
  return np.asarray(compiled(x)).reshape(64, D)


@functools.cache
def on_one_device():
  """The factors without a mesh, and which tokens capacity keeps."""
  route = routing()
  return mask(route), np.asarray(route.keep_mk)[:, 0]


@pytest.mark.long(but=('shape3',))
@pytest.mark.parametrize('shape', MESHES)
def test_one_mask_on_every_mesh(shape):
  route, (want, keep) = routing(), on_one_device()
  np.testing.assert_array_equal(mask(route, shape), want)
  assert 4 < (~keep).sum() < 48 and not want[~keep].any()
  assert set(np.unique(want)) == {0.0, 2.0} and 0.4 < (want[keep] > 0).mean() < 0.6
  np.testing.assert_array_equal(mask(route, shape, node=True), want)
  np.testing.assert_array_equal(mask(route, shape, factor=0.0), want)


def test_the_mask_belongs_to_the_token_and_not_to_the_expert():
  route = routing()
  everyone = dataclasses.replace(
      route, keep_mk=jnp.ones((64, 1), bool), gate_mk=jnp.ones((64, 1))
  )
  want, (some, keep) = mask(everyone), on_one_device()
  np.testing.assert_array_equal(some[keep], want[keep])
  other = dataclasses.replace(everyone, choice_mk=(everyone.choice_mk + 3) % E)
  np.testing.assert_array_equal(mask(other), want)


def test_each_choice_of_a_token_has_its_own_mask():
  route = routing(k=2)
  out = mask(route)
  both = np.asarray(route.keep_mk).all(1)
  counts = [(out[both] == v).mean() for v in (0, 2, 4)]
  np.testing.assert_allclose(counts, [0.25, 0.5, 0.25], atol=0.08)
  np.testing.assert_array_equal(mask(route, (2, 2, 2)), out)


def test_gradients_pass_where_units_are_kept():
  x = jax.random.normal(jax.random.key(0), (64, 48))
  out, pull = jax.vjp(lambda x: dropout.drop_rows(x, SEED, jnp.arange(64), 0.5), x)
  np.testing.assert_array_equal(pull(jnp.ones_like(x))[0], np.where(np.asarray(out) != 0, 2.0, 0))


CONFIG = config_lib.EncDecConfig(
    vocab_size=61, d_model=D, d_kv=8, d_ff=32, num_heads=2, num_layers=1, num_decoder_layers=1,
    dropout_rate=0.0, moe=config_lib.EncDecMoeConfig(
        num_experts=E, encoder_sparse_step=1, decoder_sparse_step=1, router_jitter_noise=0.0
    ),
)


def program(rate, train):
  params = model.abstract_params(CONFIG)
  tokens = jax.ShapeDtypeStruct((8, 4), jnp.int32)
  config = dataclasses.replace(CONFIG, dropout_rate=rate)
  return str(jax.make_jaxpr(lambda p, x: model.apply_fn(
      config, p, x, x, train=train, key=jax.random.key(0) if train else None
  ).logits_btv)(params, tokens))


def test_rate_0_and_evaluation_cost_nothing():
  multiplier = str(0x85EBCA6B)
  plain = program(0.0, False)
  assert multiplier not in plain and 'random_bits' not in plain
  assert program(0.5, False) == plain
  still = program(0.0, True)
  assert multiplier not in still and 'random_bits' not in still
  assert multiplier in program(0.5, True)


def test_a_batch_that_does_not_divide_is_named():
  with pytest.raises(UserError, match='batch 16 does not divide over data x expert = 3 devices'):
    mask(routing(), (3, 1, 1))
