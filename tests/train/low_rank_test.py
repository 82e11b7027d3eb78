"""Matrices that train as left right + rest: parts, starts, pruning, what is left."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config as config_lib
from moejax import errors, sharding, tree, weights
from moejax.model import Model
from moejax.train import low_rank, optim
from moejax.train import state as state_lib
from moejax.train import step as step_lib

EXPERTS = r'.*/experts/(wi|gate|wo)'
ADAPTERS = ((r'.*/(left|right)', 1.0), ('.*', 0.0))


def factored(experiment, train=None, optim=None, mesh=None, **settings):
  given = {'matrices': EXPERTS, 'rank': 4, 'warmup_steps': 1, 'settle_steps': 2, **settings}
  low = config_lib.LowRankConfig(**given)
  change = lambda part, values: dataclasses.replace(part, **(values or {}))
  return dataclasses.replace(
      experiment, low_rank=low, train=change(experiment.train, train),
      optim=change(experiment.optim, optim), mesh=change(experiment.mesh, mesh),
  )


def trained(experiment, setup, steps=3, params=None):
  mesh = sharding.make_mesh(experiment.mesh)
  optimizer = low_rank.make_optimizer(experiment, state_lib.abstract_params(experiment))
  places = state_lib.shardings(state_lib.abstract(experiment, optimizer), mesh)
  state = state_lib.init(experiment, optimizer, mesh, setup.params if params is None else params)
  step = step_lib.jit_train_step(experiment, optimizer, mesh, places)
  losses = []
  for i in range(steps):
    batch = jax.device_put(
        jax.device_get(setup.batch(i % 2)), sharding.batch_sharding(mesh)
    )
    state, metrics = step(state, batch)
    losses.append(float(metrics['cross_entropy']))
  return state, losses


@pytest.mark.parametrize('start', ('svd', 'zeros'))
def test_parts_add_up_to_the_matrix(common, start):
  setup = common.setup(common.experiment())
  everything = r'.*(/experts/(wi|wo)|attention/(q|k|v|o))'
  config = config_lib.LowRankConfig(matrices=everything, rank=3, start=start, alpha=6.0)
  parts = low_rank.split(setup.params, config, seed=1)
  flat, before = tree.flatten(parts), tree.flatten(setup.params)
  whole = tree.flatten(low_rank.whole(parts, config))
  assert set(whole) == set(before)
  for path, leaf in whole.items():
    np.testing.assert_allclose(leaf, before[path], atol=2e-6, rtol=0)
  for path in [p.removesuffix('/rest') for p in flat if p.endswith('/rest')]:
    left, right, rest = (flat[f'{path}/{name}'] for name in low_rank.FIELDS)
    if start == 'zeros':
      assert float(jnp.abs(left).max()) > 0 and not np.any(np.asarray(right))
      np.testing.assert_array_equal(rest, before[path])
      continue
    shape = before[path].shape
    batch = shape[:1] if '/experts/' in path else ()
    outputs = shape[-1] if 'experts' in path or not path.endswith(('q', 'k', 'v')) else (
        shape[-1] * shape[-2])
    flattened = lambda a: np.asarray(a).reshape(*batch, -1, outputs)
    u, s, v = np.linalg.svd(flattened(before[path]), full_matrices=False)
    want = (u[..., :3] * s[..., None, :3]) @ v[..., :3, :]
    np.testing.assert_allclose(
        flattened(before[path]) - flattened(rest), want, atol=2e-5, rtol=0
    )


def test_a_scale_of_alpha_over_rank(common):
  params = {'ffn': {'wi': jnp.zeros((4, 6))}}
  config = config_lib.LowRankConfig(matrices='.*', rank=2, start='zeros', alpha=6.0)
  parts = low_rank.split(params, config, seed=0)
  parts['ffn']['wi']['right'] = jnp.ones((2, 6))
  got = low_rank.whole(parts, config)['ffn']['wi']
  np.testing.assert_allclose(got, 3 * parts['ffn']['wi']['left'] @ np.ones((2, 6)), rtol=1e-6)
  stack = {'experts': {'wi': {name: leaf[None] for name, leaf in parts['ffn']['wi'].items()}}}
  node = low_rank.compact(stack, config)['experts']['wi']
  np.testing.assert_allclose(node.dense(jnp.float32)[0], got, rtol=1e-6)


@pytest.mark.long
def test_adapters_alone_learn_and_fold(common):
  setup = common.setup(common.experiment())
  experiment = factored(
      setup.experiment, start='zeros', optim={'learning_rate_rules': ADAPTERS}
  )
  state, losses = trained(experiment, setup, steps=6)
  assert losses[-2] < losses[0]
  moments = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if np.ndim(leaf)]
  adapters = [leaf.shape for path, leaf in tree.flatten(state.params).items()
              if path.endswith(('/left', '/right'))]
  assert sorted(moments) == sorted(adapters * 2)
  before = tree.flatten(setup.params)
  for path, leaf in tree.flatten(state.params).items():
    if path.endswith('/rest') or path in before:
      np.testing.assert_array_equal(leaf, before[path.removesuffix('/rest')])
  after = tree.flatten(low_rank.finished(
      state_lib.model_params(experiment, state), experiment.low_rank, np.float32
  ))
  moved = {path for path in before if not np.array_equal(before[path], after[path])}
  assert moved == {path for path in before if '/experts/' in path}


def test_what_is_not_trained_is_left_out(common):
  setup = common.setup(common.experiment())
  rules = lambda *own: dataclasses.replace(setup.experiment.optim, learning_rate_rules=own)
  kept, still = optim.split_trained(rules(('.*/router/.*', 0.0), ('.*', 1.0)), setup.params)
  assert {'/router/' in path for path in tree.flatten(still)} == {True}
  assert tree.flatten(tree.join(kept, still)).keys() == tree.flatten(setup.params).keys()
  assert not any('/router/' in path for path in tree.flatten(kept))
  with pytest.raises(errors.UserError, match='keep every parameter'):
    optim.split_trained(rules(('.*', 0.0)), setup.params)


@pytest.mark.long
def test_the_rest_is_pruned_to_the_share_and_compacts(common):
  setup = common.setup(common.experiment())
  experiment = factored(setup.experiment, kept=0.25, train={'steps': 8})
  state, losses = trained(experiment, setup, steps=8)
  assert all(np.isfinite(losses))
  params = state_lib.model_params(experiment, state)
  rests = [leaf for path, leaf in tree.flatten(params).items() if path.endswith('/rest')]
  total = sum(leaf.size for leaf in rests)
  left = sum(int((np.asarray(leaf) != 0).any(1).sum()) * leaf.shape[1] for leaf in rests)
  assert 0.25 * total <= left <= 0.25 * total + max(leaf.shape[1] for leaf in rests)
  small = Model(experiment.model, low_rank.finished(params, experiment.low_rank, np.float32))
  dense = Model(experiment.model, low_rank.whole(params, experiment.low_rank))
  nodes = [leaf for leaf in tree.flatten(small.params).values()
           if isinstance(leaf, weights.LowRankSparse)]
  assert len(nodes) == len(rests)
  batch = jax.device_get(setup.batch(0))
  got, want = (m.apply(batch['encoder_tokens'], batch['decoder_tokens']).logits_btv
               for m in (small, dense))
  np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.long
def test_sharded_and_stacked_it_is_the_same_run(common):
  setup = common.setup(common.experiment())
  one = factored(setup.experiment, kept=0.5, train={'steps': 8})
  many = factored(
      setup.experiment, kept=0.5, train={'steps': 8, 'scan_layers': True},
      mesh={'data': 2, 'expert': 2},
  )
  (a, losses), (b, sharded) = (trained(e, setup, steps=4) for e in (one, many))
  np.testing.assert_allclose(sharded, losses, rtol=2e-5)
  specs = {path.rpartition('/experts/')[2]: tuple(leaf.sharding.spec)
           for path, leaf in tree.flatten(b.params).items() if '/experts/' in path}
  assert specs['wi/rest'][1:] == ('expert', 'data', 'tensor')
  assert specs['wi/left'][1:3] == specs['wo/right'][1:4:2] == ('expert', 'data')
  a, b = (tree.flatten(state_lib.model_params(e, s)) for e, s in ((one, a), (many, b)))
  for path, leaf in a.items():
    if not path.endswith('/left') and not path.endswith('/right'):  # a pair may turn together
      np.testing.assert_allclose(b[path], leaf, atol=3e-4)


@pytest.mark.parametrize('settings, message', (
    ({'matrices': '.*/expert/wi'}, 'matches none of the paths'),
    ({'matrices': '.*norm'}, 'is no matrix'),
    ({'rank': 99}, 'has ranks from 1 to'),
    ({'matrices': '.*attention/q', 'kept': 0.5}, 'of experts only'),
    ({'matrices': '('}, 'no regular expression'),
    ({'kept': 0.0}, 'a share above 0'), ({'start': 'svdd'}, "did you mean 'svd'"),
    ({'kept': 0.5, 'settle_steps': 500}, 'do not fit'),
))
def test_settings_that_do_not_fit(common, settings, message):
  setup = common.setup(common.experiment())
  with pytest.raises(errors.UserError, match=message):
    experiment = factored(setup.experiment, **settings)
    low_rank.make_optimizer(experiment, state_lib.abstract_params(experiment))
