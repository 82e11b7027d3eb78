"""Schedules by their formulas, rules that cover every parameter, one update by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax import config as config_lib
from moejax import errors
from moejax.train import optim

PARAMS = {
    'encoder': {
        'final_norm': jnp.ones(4),
        'layers_0': {
            'attention': {'q': jnp.ones((4, 2, 2)), 'o': jnp.ones((2, 2, 4))},
            'ffn': {'router': {'kernel': jnp.ones((4, 3))}, 'experts': {'wi': jnp.ones((3, 4, 8))}},
        },
    },
    'shared': {'embedding': jnp.ones((16, 4))},
}


def rate(step, **overrides):
  values = dict(learning_rate=2.0, warmup_steps=10, end_fraction=0.1) | overrides
  return float(optim.schedule(config_lib.OptimConfig(**values), 110)(step))


def test_warm_up_is_linear_and_ends_at_the_peak():
  np.testing.assert_allclose([rate(0), rate(4)], [0.2, 1.0], rtol=1e-6)
  for name in optim.SCHEDULES:
    np.testing.assert_allclose(rate(9, schedule=name, decay_steps=50), 2.0, rtol=2e-3)


@pytest.mark.parametrize(
    'name, step, want',
    [
        ('constant', 109, 2.0),
        ('linear', 60, 2.0 * (0.1 + 0.9 * 0.5)),
        ('linear', 110, 0.2),
        ('cosine', 60, 2.0 * (0.1 + 0.9 * 0.5)),
        ('cosine', 85, 2.0 * (0.1 + 0.9 * (0.5 - 0.5 * np.cos(np.pi / 4)))),
        ('rsqrt', 39, 2.0 * (10 / 40) ** 0.5),
        ('wsd', 59, 2.0),
        ('wsd', 85, 2.0 * (0.1 + 0.9 * 0.5)),
        ('wsd', 110, 0.2),
    ],
)
def test_schedules_by_hand(name, step, want):
  np.testing.assert_allclose(rate(step, schedule=name, decay_steps=50), want, rtol=1e-5)


def test_bad_names_suggest_the_nearest():
  with pytest.raises(errors.UserError, match="did you mean 'cosine'"):
    rate(0, schedule='cosin')
  with pytest.raises(errors.UserError, match="did you mean 'adamw'"):
    optim.make_optimizer(config_lib.OptimConfig(optimizer='adam'), 10_000, PARAMS)
  with pytest.raises(errors.UserError, match=r'optim\.warmup_steps = 120 .* train\.steps = 110'):
    rate(0, warmup_steps=120)


def test_first_rule_wins_and_a_gap_is_an_error():
  rules = ((r'.*norm', 0.0), (r'encoder/.*', 0.5), (r'.*', 1.0))
  got = optim.by_rules(rules, PARAMS, 'optim.weight_decay_rules')
  assert got['encoder']['final_norm'] == 0.0
  assert got['encoder']['layers_0']['attention']['q'] == 0.5
  assert got['shared']['embedding'] == 1.0
  with pytest.raises(errors.UserError, match=r"weight_decay_rules: .*'shared/embedding'"):
    optim.by_rules(rules[:2], PARAMS, 'optim.weight_decay_rules')


def _updates(config, grads):
  optimizer = optim.make_optimizer(config, 1000, PARAMS)
  return jax.jit(optimizer.update)(grads, optimizer.init(PARAMS), PARAMS)[0]


def test_adamw_first_update_by_hand():
  config = config_lib.OptimConfig(
      learning_rate=0.1, warmup_steps=0, schedule='constant', weight_decay=0.5, clip_norm=0.0,
      learning_rate_rules=((r'shared/.*', 0.25), (r'.*', 1.0)), eps=0.0,
  )
  updates = _updates(config, jax.tree.map(lambda p: 3.0 * jnp.ones_like(p), PARAMS))
  # Adam's first step is sign(g); decay adds 0.5 * p except on norms; then the rate.
  np.testing.assert_allclose(updates['encoder']['layers_0']['attention']['q'], -0.15, rtol=1e-5)
  np.testing.assert_allclose(updates['encoder']['final_norm'], -0.1, rtol=1e-5)
  np.testing.assert_allclose(updates['shared']['embedding'], -0.15 * 0.25, rtol=1e-5)


def test_clipping_bounds_the_global_norm():
  optimizer = optim.make_optimizer(config_lib.OptimConfig(warmup_steps=0), 10, PARAMS)
  big = jax.tree.map(lambda p: 100.0 * p, PARAMS)
  _, state = jax.jit(optimizer.update)(big, optimizer.init(PARAMS), PARAMS)
  adam = next(s for s in state if hasattr(s, 'mu'))
  # Adam's first moment is (1 - b1) times the clipped gradient.
  np.testing.assert_allclose(optax.tree.norm(adam.mu), 0.1, rtol=1e-5)


@pytest.mark.parametrize('asked', [False, True])
def test_adafactor_moves_a_parameter_by_its_own_size_once(asked):
  config = config_lib.OptimConfig(
      optimizer='adafactor', learning_rate=0.01, warmup_steps=0, schedule='constant',
      weight_decay=0.0, clip_norm=0.0, scale_by_param_rms=asked,
  )
  optimizer = optim.make_optimizer(config, 10, PARAMS)
  params = jax.tree.map(lambda p: 3.0 * p, PARAMS)
  grads = jax.tree.map(lambda p: 0.7 * jnp.ones_like(p), PARAMS)
  updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
  jax.tree.map(lambda u: np.testing.assert_allclose(u, -0.03, rtol=1e-3), updates)


@pytest.mark.parametrize('changes', [
    {'optimizer': 'adafactor'}, {'optimizer': 'adafactor', 'scale_by_param_rms': True},
    {'scale_by_param_rms': True},
])
def test_a_stacked_layer_is_updated_as_by_itself(changes):
  config = config_lib.OptimConfig(
      learning_rate=0.01, warmup_steps=0, schedule='constant', clip_norm=0.0, **changes
  )
  keys = jax.random.split(jax.random.key(0), 3)
  layers = [
      {'ffn': {'wi': (i + 1) * jax.random.normal(key, (130, 140))}, 'norm': i + jnp.ones(130)}
      for i, key in enumerate(keys)
  ]
  grads = jax.tree.map(lambda p: jnp.sin(9 * p), layers)

  def update(layers, grads, name):
    params, grads = ({'decoder': {name: {'layer_0': x}}} for x in (layers, grads))
    optimizer = optim.make_optimizer(config, 10, params)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    return updates['decoder'][name]['layer_0']

  join = lambda trees: jax.tree.map(lambda *rows: jnp.stack(rows), *trees)
  want = join([update(p, g, 'alone') for p, g in zip(layers, grads)])
  got = update(join(layers), join(grads), 'blocks')
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


def test_muon_orthogonalises_each_expert_and_leaves_the_rest_to_adam():
  config = config_lib.OptimConfig(
      optimizer='muon', learning_rate=1.0, warmup_steps=0, schedule='constant', weight_decay=0.0,
      clip_norm=0.0,
  )
  grads = jax.tree.map(
      lambda p: jax.random.normal(jax.random.key(p.size), p.shape, p.dtype), PARAMS
  )
  updates = _updates(config, grads)
  wi = np.asarray(updates['encoder']['layers_0']['ffn']['experts']['wi']) / (0.2 * 8**0.5)
  for expert in wi:
    singular = np.linalg.svd(expert, compute_uv=False)
    assert singular.min() > 0.5 and singular.max() < 1.4
  adam = np.asarray(updates['shared']['embedding'])
  np.testing.assert_allclose(np.abs(adam), 1.0, rtol=1e-3)
