"""The encoder-decoder as a pure function: determinism, masks, modes, shards."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config as config_lib
from moejax import model, sharding, tree
from moejax.errors import UserError
from moejax.nn import switch as switch_nn

SWITCH = config_lib.EncDecConfig(
    vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=2, num_decoder_layers=2,
    relative_attention_num_buckets=8, relative_attention_max_distance=16,
    moe=config_lib.EncDecMoeConfig(num_experts=8, router_ignore_padding_tokens=True),
)
T5 = dataclasses.replace(
    SWITCH, family='t5', moe=None, gated=True, activation='gelu_new', tie_embeddings=False
)
CONFIGS = {'switch': SWITCH, 't5': T5}


def tokens(batch=8, source=12, target=9):
  keys = jax.random.split(jax.random.key(7), 2)
  return (
      jax.random.randint(keys[0], (batch, source), 2, 97),
      jax.random.randint(keys[1], (batch, target), 2, 97),
  )


@pytest.fixture(scope='module', params=CONFIGS)
def built(request):
  config = CONFIGS[request.param]
  return config, model.init_params(config, jax.random.key(0))


def test_shapes_and_abstract_params_agree(built):
  config, params = built
  x, y = tokens()
  out = model.apply_fn(config, params, x, y)
  assert out.logits_btv.shape == (8, 9, 97) and out.logits_btv.dtype == jnp.float32
  assert out.encoder_bsd.shape == (8, 12, 32)
  expected = ['decoder/layers_1/ffn', 'encoder/layers_1/ffn'] if config.moe else []
  assert sorted(out.routings) == expected
  shapes = jax.tree.map(lambda a: a.shape, params)
  assert shapes == jax.tree.map(lambda a: a.shape, model.abstract_params(config))


def test_decoder_sees_no_future(built):
  config, params = built
  x, y = tokens()
  changed = y.at[:, 6:].set(5)
  a = model.apply_fn(config, params, x, y).logits_btv
  b = model.apply_fn(config, params, x, changed).logits_btv
  np.testing.assert_allclose(a[:, :6], b[:, :6], atol=1e-5)
  assert np.abs(np.asarray(a[:, 6:] - b[:, 6:])).max() > 1e-3


def test_padding_changes_nothing(built):
  config, params = built
  x, y = tokens()
  padded = jnp.pad(x, ((0, 0), (0, 5)))
  a = model.apply_fn(config, params, x, y, encoder_mask=x != 0).logits_btv
  b = model.apply_fn(config, params, padded, y, encoder_mask=padded != 0).logits_btv
  np.testing.assert_allclose(a, b, atol=2e-5)


def test_noise_only_in_training(built):
  config, params = built
  x, y = tokens()
  run = lambda **kwargs: np.asarray(model.apply_fn(config, params, x, y, **kwargs).logits_btv)
  np.testing.assert_array_equal(run(), run(key=jax.random.key(3)))
  one, two = run(train=True, key=jax.random.key(1)), run(train=True, key=jax.random.key(2))
  assert np.abs(one - two).max() > 1e-3
  np.testing.assert_array_equal(one, run(train=True, key=jax.random.key(1)))
  with pytest.raises(ValueError, match='needs a key'):
    run(train=True)


def test_router_jitter_alone_changes_gates_in_training():
  config = dataclasses.replace(
      SWITCH, dropout_rate=0.0, moe=dataclasses.replace(SWITCH.moe, router_jitter_noise=0.3)
  )
  params = model.init_params(config, jax.random.key(0))
  x, y = tokens()
  path = 'encoder/layers_1/ffn'
  still = model.apply_fn(config, params, x, y).routings[path]
  noisy = model.apply_fn(config, params, x, y, train=True, key=jax.random.key(1)).routings[path]
  assert np.abs(np.asarray(still.logits_me - noisy.logits_me)).max() > 1e-3


@pytest.mark.long
def test_remat_gives_the_same_gradients():
  config, params = T5, model.init_params(T5, jax.random.key(0))
  x, y = tokens()

  def loss(params, remat):
    out = model.apply_fn(config, params, x, y, train=True, key=jax.random.key(1), remat=remat)
    return jax.nn.log_softmax(out.logits_btv)[..., 0].mean()

  plain, again = (
      jax.jit(jax.grad(functools.partial(loss, remat=remat)))(params) for remat in (False, True)
  )
  for path, value in tree.flatten(plain).items():
    np.testing.assert_allclose(value, tree.get(again, path), atol=1e-6, err_msg=path)


def test_bfloat16_activations_keep_router_and_logits_in_float32():
  params = model.init_params(SWITCH, jax.random.key(0))
  x, y = tokens()
  out = model.apply_fn(SWITCH, params, x, y, dtype=jnp.bfloat16)
  assert out.logits_btv.dtype == jnp.float32 and out.encoder_bsd.dtype == jnp.bfloat16
  assert all(r.logits_me.dtype == jnp.float32 for r in out.routings.values())
  exact = model.apply_fn(SWITCH, params, x, y).logits_btv
  assert np.abs(np.asarray(out.logits_btv - exact)).mean() < 0.1


@pytest.mark.long(but=('switch-2-4-1', 'switch-2-2-2', 't5-2-2-2', 't5-8-1-1'))
@pytest.mark.parametrize('data, expert, tensor', [(8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)])
def test_sharded_forward_equals_one_device(built, data, expert, tensor):
  config, params = built
  x, y = tokens()
  mesh = sharding.make_mesh(config_lib.MeshConfig(data=data, expert=expert, tensor=tensor))
  placed = jax.device_put(params, sharding.param_shardings(params, mesh))
  one = model.apply_fn(config, params, x, y).logits_btv
  many = jax.jit(lambda p: model.apply_fn(config, p, x, y, mesh=mesh).logits_btv)(placed)
  np.testing.assert_allclose(one, many, atol=2e-5)


def test_one_layer_runs_from_its_own_params():
  params = model.init_params(SWITCH, jax.random.key(0))
  x = jax.random.normal(jax.random.key(1), (2, 6, 32))
  layer = switch_nn.Layer(SWITCH, 'encoder', True)
  own = params['encoder']['layers_1']
  bias = jnp.zeros((1, 4, 6, 6))
  attention_only = {'params': {'attention': own['attention']}}
  attended = layer.apply(attention_only, x, bias, method='attend')
  router_only = {'params': {'ffn': {k: own['ffn'][k] for k in ('norm', 'router')}}}
  normed, routing = layer.apply(router_only, attended, method='route')
  whole, whole_routing = layer.apply({'params': own}, x, bias)
  np.testing.assert_array_equal(routing.choice_mk, whole_routing.choice_mk)
  assert normed.shape == x.shape and whole.shape == x.shape


def test_a_wrong_node_or_array_is_refused():
  params = model.init_params(SWITCH, jax.random.key(0))
  x, y = tokens()

  @jax.tree_util.register_dataclass
  @dataclasses.dataclass(frozen=True)
  class Node:
    codes: jax.Array
    shape: tuple = dataclasses.field(metadata=dict(static=True))

  node = Node(jnp.zeros((8, 32, 64), jnp.int8), (8, 32, 60))
  wrong = tree.replace(params, 'encoder/layers_1/ffn/experts/wi', node)
  with pytest.raises(ValueError, match=r'experts/wi: node of shape \(8, 32, 60\), expected'):
    model.apply_fn(SWITCH, wrong, x, y)


@pytest.mark.parametrize('shapes', [
    [(2, 3), (1, 3)], [(2, 3)], [(3,), (3,)], [(0, 3), (0, 3)], [(2, 0), (2, 3)],
])
def test_tokens_that_do_not_fit_are_named(shapes):
  tokens = [jnp.zeros(shape, jnp.int32) for shape in shapes]
  with pytest.raises(UserError, match='takes encoder tokens, decoder tokens of shape'):
    model.Model(SWITCH, {}).apply(*tokens)
