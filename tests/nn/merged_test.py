"""Models whose layers hold fewer experts than their router chooses among, or different numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import account, tree
from moejax import config as config_lib
from moejax.compress import driver, quantize
from moejax.convert import folder as convert
from moejax.errors import UserError
from moejax.generate import generate
from moejax.model import Model, abstract_params
from moejax.nn import stacking

pytestmark = pytest.mark.once

EXPERTS, D, F = 6, 16, 24


def decoder(**moe):
  settings = {'num_experts': EXPERTS, 'top_k': 2, 'router': 'topk', 'normalize_gates': True}
  return config_lib.DecoderConfig(
      family='mixtral', vocab_size=40, d_model=D, d_head=8, d_ff=F, num_heads=2, num_kv_heads=2,
      num_layers=3, eos_ids=(1,), initializer_std=0.3,
      moe=config_lib.DecoderMoeConfig(**{**settings, **moe}),
  )


def encdec(**moe):
  settings = {'num_experts': EXPERTS, 'encoder_sparse_step': 2, 'decoder_sparse_step': 1}
  return config_lib.EncDecConfig(
      vocab_size=40, d_model=D, d_kv=8, d_ff=F, num_heads=2, num_layers=2, num_decoder_layers=2,
      dropout_rate=0.0, moe=config_lib.EncDecMoeConfig(**{**settings, **moe}),
  )


HELD = {'decoder': (2, 4, 1), 'encdec': (3, 1, 5)}
MAKE = {'decoder': decoder, 'encdec': encdec}


def expanded(params):
  """Every choice of the router given a copy of its expert, without a map."""
  flat = tree.flatten(params)
  out = {}
  for path, leaf in flat.items():
    layer, found, _ = path.partition('/experts/')
    if found:
      leaf = leaf[np.asarray(flat[f'{layer}/expert_map'])]
    if not path.endswith('/expert_map'):
      out[path] = leaf
  return tree.unflatten(out)


def tokens(kind):
  rng = np.random.default_rng(0)
  draw = lambda length: jnp.asarray(rng.integers(2, 40, (2, length)), jnp.int32)
  return (draw(9),) if kind == 'decoder' else (draw(7), draw(5))


@pytest.fixture(scope='module', params=MAKE)
def merged(request):
  kind = request.param
  config = MAKE[kind](layer_experts=HELD[kind], merged=True)
  model = Model.init(config, jax.random.key(0))
  rng = np.random.default_rng(1)
  flat = tree.flatten(model.params)
  for path in flat:
    if path.endswith('/expert_map'):
      held = flat[path.replace('expert_map', 'experts/wi')].shape[0]
      order = np.concatenate([np.arange(held), rng.integers(0, held, EXPERTS - held)])
      flat[path] = jnp.asarray(rng.permutation(order), jnp.int32)
  return kind, Model(config, tree.unflatten(flat))


@pytest.mark.long(but=('decoder',))
def test_it_is_the_model_with_a_copy_for_every_choice(merged):
  kind, model = merged
  whole = Model(MAKE[kind](), expanded(model.params))
  np.testing.assert_allclose(
      model.apply(*tokens(kind)).logits_btv, whole.apply(*tokens(kind)).logits_btv, atol=1e-5
  )


def test_layers_hold_what_the_config_says(merged):
  kind, model = merged
  flat = tree.flatten(model.params)
  wi = [leaf for path, leaf in flat.items() if path.endswith('experts/wi')]
  assert sorted(w.shape[0] for w in wi) == sorted(HELD[kind])
  maps = [leaf for path, leaf in flat.items() if path.endswith('expert_map')]
  assert all(m.dtype == jnp.int32 and m.shape == (EXPERTS,) for m in maps)
  routers = [leaf for path, leaf in flat.items() if path.endswith('router/kernel')]
  assert all(r.shape == (D, EXPERTS) for r in routers)
  shapes = abstract_params(model.config, jnp.bfloat16)
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(shapes)} == {'bfloat16', 'int32'}
  matrices = 3 if kind == 'decoder' else 2
  saved = (len(wi) * EXPERTS - sum(HELD[kind])) * matrices * D * F
  whole = account.parameters(abstract_params(MAKE[kind]()))
  assert account.parameters(model.params) == whole - saved
  assert account.summary(model.params, model.config)['parameters'] == whole - saved


@pytest.mark.long(but=('decoder',))
def test_saved_loaded_and_generated_from(merged, tmp_path):
  kind, model = merged
  model.save(tmp_path / 'merged')
  again = Model.load(tmp_path / 'merged')
  assert again.config == model.config
  np.testing.assert_array_equal(
      again.apply(*tokens(kind)).logits_btv, model.apply(*tokens(kind)).logits_btv
  )
  whole = Model(MAKE[kind](), expanded(model.params))
  prompt = np.asarray(tokens(kind)[0][:1, :4]).tolist()
  ours, theirs = (generate(m, prompt, max_new_tokens=6) for m in (again, whole))
  assert [list(row) for row in ours.tokens] == [list(row) for row in theirs.tokens]


@pytest.mark.long
def test_it_can_be_quantized_behind_its_map(merged):
  kind, model = merged
  rng = np.random.default_rng(2)
  draw = lambda: rng.integers(2, 40, (4, 12)).astype(np.int32)

  def batch():
    names = ('tokens',) if kind == 'decoder' else ('encoder_tokens', 'decoder_tokens')
    return {**{name: draw() for name in names}, 'targets': draw(),
            'weights': np.ones((4, 12), np.float32)}

  valid = batch()
  result = driver.compress(model, quantize.quantize(4), [batch()], validation_batches=[valid])

  def loss(model):
    own = [jnp.asarray(v) for name, v in valid.items() if name.endswith('tokens')]
    log_probs = jax.nn.log_softmax(model.apply(*own).logits_btv)
    return -jnp.take_along_axis(log_probs, jnp.asarray(valid['targets'])[..., None], -1).mean()

  assert result.report['before']['loss'] == pytest.approx(float(loss(model)), rel=1e-5)
  assert result.report['after']['loss'] == pytest.approx(float(loss(result.model)), rel=1e-5)
  flat = tree.flatten(result.model.params)
  held = [w.shape[0] for path, w in flat.items() if path.endswith('experts/wo')]
  assert sorted(held) == sorted(HELD[kind])
  matrices = 3 if kind == 'decoder' else 2
  assert len(result.report['layers']) == sum(held) * matrices


@pytest.mark.long
def test_a_pruned_model_is_one_with_smaller_routers():
  config = decoder(layer_experts=(2, 4, 3))
  params = tree.flatten(abstract_params(config))
  held = [params[f'decoder/layers_{i}/ffn/experts/wi'].shape[0] for i in range(3)]
  rows = [params[f'decoder/layers_{i}/ffn/router/kernel'].shape[1] for i in range(3)]
  assert held == rows == [2, 4, 3]
  assert not any(path.endswith('expert_map') for path in params)
  logits = Model.init(config, jax.random.key(0)).apply(*tokens('decoder')).logits_btv
  assert np.isfinite(logits).all()


def test_equal_layers_stack_and_unequal_ones_do_not():
  same, other = decoder(layer_experts=(2,), merged=True), decoder(layer_experts=(2, 4, 2))
  assert stacking.period(same) == 1 and stacking.period(other) == 3
  model = Model.init(same, jax.random.key(0))
  stacked = Model(same, stacking.stack(model.params, same))
  np.testing.assert_allclose(
      stacked.apply(*tokens('decoder')).logits_btv, model.apply(*tokens('decoder')).logits_btv,
      atol=1e-5,
  )


@pytest.mark.long
def test_the_numbers_of_the_paper():
  """MC-SMoE's switch-base-32 (sections 4 and A): whole, and merged to 8 a layer but for one."""
  from moejax import presets

  config = presets.preset('switch-base-32')
  assert round(account.parameters(abstract_params(config)) / 1e6, 2) == 1978.51
  moe = dataclasses.replace(config.moe, layer_experts=(32, *[8] * 11), merged=True)
  merged = dataclasses.replace(config, moe=moe)
  assert round(account.parameters(abstract_params(merged)) / 1e6, 2) == 732.81


@pytest.mark.parametrize('make, message', [
    (lambda: decoder(layer_experts=(2, 4)), r'layer_experts = \(2, 4\): one number for all, or 3'),
    (lambda: decoder(layer_experts=(2, 7, 4)), 'each between 2 and moe.num_experts = 6'),
    (lambda: decoder(layer_experts=(1, 2, 2)), 'each between 2 and'),
    (lambda: decoder(merged=True), r'moe\.merged = True: moe\.layer_experts must say'),
    (lambda: convert.entries(decoder(layer_experts=(2, 4, 3))), r'layers that hold \(2, 4, 3\)'),
])
def test_what_cannot_be(make, message):
  with pytest.raises(UserError, match=message):
    make()
