"""LoSparse's pruning against the arrays of MC-SMoE's published code, and its contract."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.errors import UserError
from moejax.train import sparsify

DATA = dict(np.load(Path(__file__).parents[1] / 'vectors' / 'mcsmoe' / 'losparse.npz'))
NAMES = ('e0.wi.sparse', 'e0.wo.sparse', 'e1.wi.sparse')
SMALL = {'steps': 60, 'warmup': 5, 'kept': 0.10}
VARIANTS = {
    'default': {}, 'dt4': {'every': 4}, 'platon_beta2': {'uncertainty': 0.95},
    'magnitude': {'score': 'magnitude'}, 'col': {'unit': 'input'},
    'unstructured': {'unit': 'weight'}, 'row_sum': {'reduce': 'sum'},
}


@pytest.mark.parametrize('name, settings', [
    ('small', SMALL), ('dt4', {**SMALL, 'every': 4}), ('readme_like', {'steps': 2500}),
    ('paper', {'steps': 10_000, 'warmup': 400}),
])
def test_schedule(name, settings):
  kept, prunes = sparsify.schedule(sparsify.Pruning(**settings))
  steps = DATA[f'schedule/{name}/step']
  np.testing.assert_allclose(kept[steps], DATA[f'schedule/{name}/threshold'], rtol=0, atol=1e-12)
  np.testing.assert_array_equal(prunes[steps], DATA[f'schedule/{name}/mask_ind'])


@pytest.mark.parametrize('variant', VARIANTS)
def test_sixty_steps(variant):
  """Every mask of every step, and what is left at the end."""
  pruning = sparsify.Pruning(**SMALL, **VARIANTS[variant])
  optimizer = sparsify.sparsify(
      optax.sgd(float(DATA['prune/lr'])), pruning, lambda path: path.endswith('sparse')
  )
  params = {name: jnp.asarray(DATA[f'prune/W0/{name}'].T) for name in NAMES}
  params['bias'] = jnp.ones(3)
  state = optimizer.init(params)

  @jax.jit
  def step(params, state, grads):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for i in range(60):
    grads = {name: jnp.asarray(DATA[f'prune/grads/{name}'][i].T) for name in NAMES}
    params, state = step(params, state, {**grads, 'bias': jnp.ones(3)})
    for name in NAMES:
      want = np.unpackbits(DATA[f'prune/{variant}/nonzero_mask/{name}'][i])
      got = np.asarray(params[name]).T
      np.testing.assert_array_equal(got != 0, want[: got.size].reshape(got.shape), f'{i} {name}')
  for name in NAMES:
    np.testing.assert_allclose(
        params[name].T, DATA[f'prune/{variant}/W_final/{name}'], rtol=0, atol=1e-5
    )
    if variant != 'magnitude':
      np.testing.assert_allclose(
          state.smoothed[name].T, DATA[f'prune/{variant}/exp_avg_ipt_final/{name}'], rtol=0,
          atol=1e-5,
      )
  np.testing.assert_allclose(params['bias'], 1 - 60 * float(DATA['prune/lr']), rtol=1e-5)


def test_stacked_experts_are_pruned_like_single_ones():
  """A leaf [e, d, f] counts as its experts' matrices, and Adam behind it stays Adam."""
  rng = np.random.default_rng(0)
  w, grads = rng.normal(size=(3, 4, 6)), rng.normal(size=(20, 3, 4, 6))
  pruning = sparsify.Pruning(steps=20, warmup=2, kept=0.3)

  def run(cut, join):
    optimizer = sparsify.sparsify(optax.adam(0.01), pruning, lambda path: True)
    params = cut(jnp.asarray(w, jnp.float32))
    state = optimizer.init(params)
    for g in grads:
      updates, state = optimizer.update(cut(jnp.asarray(g, jnp.float32)), state, params)
      params = optax.apply_updates(params, updates)
    return join(params)

  whole = run(lambda a: {'w': a}, lambda p: p['w'])
  single = run(lambda a: {str(i): a[i] for i in range(3)}, lambda p: jnp.stack(list(p.values())))
  np.testing.assert_allclose(whole, single, rtol=1e-6)
  left = np.asarray(whole).any(1).mean()
  assert 0.3 <= left <= 0.3 + 1 / 18


@pytest.mark.parametrize('settings, message', [
    ({'steps': 10, 'warmup': 5}, r'warmup = 5 and 20 steps at the end do not fit into steps = 10'),
    ({'steps': 500, 'kept': 0.0}, r'kept = 0\.0: a share above 0'),
    ({'steps': 500, 'unit': 'outputs'}, r"unit = 'outputs'.*did you mean 'output'"),
])
def test_bad_settings(settings, message):
  with pytest.raises(UserError, match=message):
    sparsify.Pruning(**settings)


def test_a_rule_that_selects_nothing():
  optimizer = sparsify.sparsify(optax.sgd(0.1), sparsify.Pruning(steps=500), lambda path: False)
  with pytest.raises(UserError, match='selects no parameter'):
    optimizer.init({'w': jnp.ones((2, 2))})
  optimizer = sparsify.sparsify(optax.sgd(0.1), sparsify.Pruning(steps=500), lambda path: True)
  with pytest.raises(UserError, match=r'selects b of shape \(2,\)'):
    optimizer.init({'b': jnp.ones(2)})
