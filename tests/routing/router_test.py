"""Every router by name: properties, hostile logits, dtypes, vmap, capacity, mistakes."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import MoeConfig
from moejax.config.moe import ROUTERS as ALL_ROUTERS
from moejax.errors import UserError
from moejax.routing import draws as draws_lib
from moejax.routing import router

B, T, E = 2, 7, 5
SINGLE = ('switch', 'sparsemixer_v1')
DENSE = ('straight_through', 'reinmax', 'densemixer')
# In evaluation the sampling routers are one code path, and the others do as in training.
# 'selection' belongs to layers that were dense; see compress/moefy_test.
ROUTERS = tuple(name for name in ALL_ROUTERS if name != 'selection')
CASES = [(name, True) for name in ROUTERS] + [
    (name, False) for name in ('gshard', 'sparsemixer_v1', 'sparsemixer_v2_star', 'densemixer')
]
TOKENS = jnp.arange(B * T).reshape(B, T) * 3


def config(name, k=2, **options):
  k = 1 if name in SINGLE else k
  return MoeConfig(num_experts=E, top_k=k, router=name, jitter_eps=0.2, **options)


def scalar(routing):
  """All that a training step could differentiate, each gate with a weight of its own."""
  weight = jnp.sin(jnp.arange(routing.gate_mk.size, dtype=routing.gate_mk.dtype))
  value = (routing.gate_mk * weight.reshape(routing.gate_mk.shape)).sum()
  value += routing.load_balance_loss + routing.z_loss
  return value if routing.log_prob_m is None else value + routing.log_prob_m.sum()


@functools.cache
def compiled(name, train, k=2, capacity=None):
  """(logits, valid, key) -> Routing and the gradient of `scalar`."""
  made = config(name, k, expert_capacity=capacity)

  def fn(logits, valid, key):
    routing = router.route(
        made, logits, key=key if train else None, valid_bt=valid, tokens_bt=TOKENS
    )
    return scalar(routing), routing

  def run(*args):
    grad, routing = jax.grad(fn, has_aux=True)(*args)
    return routing, grad

  return jax.jit(run)


def hostile(seed):
  """Random logits of a random size, with zero rows, ties, all-negative rows, offsets and +-50."""
  rng = np.random.default_rng(seed)
  rows = rng.standard_normal((B * T, E)) * rng.choice([0.1, 1.0, 30.0])
  rows[0] = 0.0
  rows[1] = rng.integers(-1, 2, E)
  rows[2] = -np.abs(rows[2]) - 1.0
  rows[3] = rng.choice([-50.0, 50.0], E)
  rows[4] = np.minimum(rows[4], 0.0)
  rows[5] += 1000.0
  return jnp.array(rows.reshape(B, T, E), jnp.float32)


@pytest.mark.parametrize('name, train', CASES)
@hypothesis.settings(deadline=None, max_examples=15)
@hypothesis.given(st.integers(0, 2**31), st.lists(st.booleans(), min_size=B * T, max_size=B * T))
def test_properties(name, train, seed, real):
  capacity = 2 if train else None
  valid = jnp.array(real).reshape(B, T)
  run = compiled(name, train, capacity=capacity)
  r, grad = jax.device_get(run(hostile(seed), valid, jax.random.key(seed)))
  columns = E if train and name in DENSE else 1 if name in SINGLE else 2
  assert r.choice_mk.shape == r.keep_mk.shape == r.gate_mk.shape == (B * T, columns)
  for x in jax.tree.leaves((r, grad)):
    assert np.isfinite(x).all()
  # Experts of a token are distinct and real.
  ordered = np.sort(r.choice_mk, -1)
  assert (np.diff(ordered, axis=-1) > 0).all() and ordered.min() >= 0 and ordered.max() < E
  # Padding is never routed; gates of what is dropped are 0 and no gate leaves [0, 1].
  assert not r.keep_mk[~np.array(real)].any()
  assert (r.gate_mk[~r.keep_mk] == 0).all()
  assert (r.gate_mk >= 0).all() and (r.gate_mk <= 1 + 1e-6).all()
  # The load is what is kept, and no more than the capacity from a sequence.
  chosen = r.keep_mk if r.candidates_mk is None else r.keep_mk & (r.candidates_mk > 0)
  onehot = np.eye(E, dtype=int)[r.choice_mk] * chosen[..., None]
  np.testing.assert_array_equal(r.load_e, onehot.sum((0, 1)))
  if capacity:
    assert onehot.reshape(B, T, -1, E).sum((1, 2)).max() <= capacity
  if r.candidates_mk is not None:
    assert r.candidates_mk.min() >= 0 and r.candidates_mk.max() <= E
    assert (r.candidates_mk[:, 0] >= 1).all()
  if r.scale_mk is not None:
    assert ((r.scale_mk > 0) & (r.scale_mk <= 1)).all()


@pytest.mark.parametrize('name', ['sparsemixer_v2', 'reinmax', 'reinforce'])
def test_as_many_choices_as_experts(name):
  """The last stages have one candidate: still a permutation, and finite."""
  run = compiled(name, True, k=E)
  for seed in range(5):
    r, grad = jax.device_get(run(hostile(seed), jnp.ones((B, T), bool), jax.random.key(seed)))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((r, grad))) and grad.any()
    np.testing.assert_array_equal(np.sort(r.choice_mk, -1), np.tile(np.arange(E), (B * T, 1)))
    np.testing.assert_array_equal(r.load_e, B * T)


@pytest.mark.parametrize('name', ['sparsemixer_v2', 'reinmax'])
def test_vmap_is_a_loop(name):
  made = config(name)
  logits, keys = jnp.stack([hostile(0), hostile(1)]), jax.random.split(jax.random.key(0), 2)
  fn = lambda z, key: router.route(made, z, key=key, tokens_bt=TOKENS)
  got, one, two = jax.jit(
      lambda z, keys: (jax.vmap(fn)(z, keys), fn(z[0], keys[0]), fn(z[1], keys[1]))
  )(logits, keys)
  for both, first, second in zip(*map(jax.tree.leaves, (got, one, two))):
    np.testing.assert_allclose(both, np.stack([first, second]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', ROUTERS)
def test_dtypes(name):
  made = config(name, variant='paper')
  names = ('gate_mk', 'logits_me', 'load_balance_loss', 'z_loss', 'scale_mk', 'log_prob_m')
  for double, given, want in (
      (False, 'float32', 'float32'), (False, 'bfloat16', 'float32'), (True, 'float64', 'float64'),
  ):
    with jax.enable_x64(double):
      r = jax.eval_shape(
          lambda z: router.route(made, z, key=jax.random.key(0), tokens_bt=TOKENS),
          jax.ShapeDtypeStruct((B, T, E), given),
      )
      floats = [getattr(r, n) for n in names if getattr(r, n) is not None]
      assert {str(x.dtype) for x in floats} == {want}
      assert r.choice_mk.dtype == r.load_e.dtype == jnp.int32 and r.keep_mk.dtype == bool


@pytest.mark.parametrize('name', ['gshard', 'sparsemixer_v2'])
def test_recorded_draws_repeat_a_key(name):
  made, key = config(name), jax.random.key(3)
  from_key, from_draws = jax.jit(lambda: (
      router.route(made, hostile(1), key=key),
      router.route(made, hostile(1), draws=draws_lib.from_key(key, 2, B * T, E)),
  ))()
  jax.tree.map(np.testing.assert_array_equal, from_key, from_draws)


def columns_of(name, k, **random):
  fn = lambda z: router.route(config(name, k), z, **random).choice_mk
  return jax.eval_shape(fn, hostile(0)).shape[-1]


def test_evaluation_of_dense_estimators_is_sparse():
  for name in DENSE:
    assert columns_of(name, 2) == 2 and columns_of(name, 2, key=jax.random.key(0)) == E


def test_threshold_takes_all_experts_unless_limited():
  assert columns_of('threshold', 1) == E and columns_of('threshold', 3) == 3


@pytest.mark.parametrize('name, k, want', [
    ('switch', 1, 2),      # 1.25 * 7 / 5 = 1.75
    ('topk', 2, 4),        # 3.5
    ('densemixer', 2, 4),  # the even share is that of the choices
    ('threshold', 2, 2),   # counts one choice
])
def test_capacity_factor_is_of_the_even_share(name, k, want):
  made = config(name, k, capacity_factor=1.25)
  assert router.expert_capacity(made, T) == want
  # All tokens want the same experts: each takes `want` of every sequence.
  logits = jnp.broadcast_to(jnp.array([3.0, 2.0, 1.0, 0.0, -1.0]), (B, T, E))
  assert jax.jit(lambda z: router.route(made, z).load_e)(logits)[0] == B * want


def test_local_balance_looks_at_each_group():
  logits = 5 * jax.nn.one_hot(jnp.array([[0] * T, [1] * T]), E)
  loss = lambda balance, groups, **r: float(jax.jit(lambda z: router.route(
      config('topk', 1, balance=balance), z, groups=groups, **r
  ).load_balance_loss)(logits))
  local = functools.partial(loss, 'local')
  whole = loss('global', 2)
  assert local(1) == pytest.approx(whole)
  assert local(2) == pytest.approx(2 * whole, rel=0.05)
  assert loss('pooled', 2) == whole
  # A batch of evaluation need not divide; one of training must.
  assert local(3) == pytest.approx(whole)
  with pytest.raises(UserError, match='does not divide into 3 groups'):
    local(3, key=jax.random.key(0))


def test_hash_needs_token_ids():
  with pytest.raises(UserError, match="moe.router = 'hash' needs the token ids"):
    router.route(config('hash'), hostile(0))


@pytest.mark.parametrize('name', ['switch', 'sparsemixer_v2', 'reinmax', 'sampled_gating'])
def test_gates_that_carry_a_gradient_are_not_normalised(name):
  with pytest.raises(UserError, match=f'the gates of router {name!r} carry its gradient'):
    config(name, normalize_gates=True)


def test_variant_and_ablation_of_the_config_reach_the_router():
  logits, key = hostile(5), jax.random.key(0)
  route = lambda **options: router.route(config('sparsemixer_v2', **options), logits, key=key)
  assert jax.eval_shape(route).scale_mk is None
  scales = jax.jit(lambda: [
      route(variant='paper', euler_on_argmax=flag).scale_mk for flag in (True, False)
  ])()
  assert (scales[1] <= scales[0]).all() and (scales[1] < scales[0]).any()
