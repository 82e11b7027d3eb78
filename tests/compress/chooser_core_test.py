"""Routers without training and the scores they aim at: recorded ones, and what they mean."""

from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.compress import chooser_core
from moejax.errors import UserError
from moejax.routing import choice

VECTORS = Path(__file__).parents[1] / 'vectors' / 'moefication'
scores = jax.jit(choice.scores, static_argnames='kind')
top = jax.jit(choice.top, static_argnames='k')


@pytest.fixture(scope='module')
def layer():
  z = np.load(VECTORS / 'fixture_sparse.npz')
  wi, wo, x = z['W1'].T, z['W2'].T, z['X']
  return {'wi': wi, 'wo': wo, 'x': x, 'hidden': np.maximum(x @ wi, 0)}


@pytest.fixture(scope='module')
def similarity():
  return np.load(VECTORS / 'similarity_sparse.npz')


@pytest.fixture(scope='module')
def derived():
  return np.load(VECTORS / 'derived_sparse_E16.npz')


@pytest.mark.parametrize('experts', [8, 16, 32])
def test_centres(layer, similarity, experts):
  got = chooser_core.centres(layer['wi'], similarity[f'E{experts}_labels'])
  np.testing.assert_allclose(got, similarity[f'E{experts}_centers'], atol=1e-6)


def test_centres_as_they_are_and_of_zeros(layer):
  labels = np.repeat([1, 0], 64)
  got = chooser_core.centres(layer['wi'], labels, normalise=False)
  want = np.stack([layer['wi'][:, 64:].mean(1), layer['wi'][:, :64].mean(1)])
  np.testing.assert_allclose(got, want, atol=1e-6)
  zero = np.zeros_like(layer['wi'])
  for router in (chooser_core.cosine, chooser_core.published_euclid):
    np.testing.assert_array_equal(router(chooser_core.centres(zero, labels))['kernel'], 0)


def _same_sets(got_me, want_me, want_mk):
  """Whether the top sets are those recorded, but for scores closer than 1e-6."""
  k = want_mk.shape[1]
  mask = np.asarray(top(got_me, k=k))
  for token, recorded in enumerate(want_mk):
    own = set(np.flatnonzero(mask[token]))
    for a, b in zip(sorted(own - set(recorded)), sorted(set(recorded) - own)):
      assert abs(want_me[token, a] - want_me[token, b]) < 1e-6


@pytest.mark.parametrize('experts', [8, 16])
def test_similarity_routers_are_the_recorded_ones(layer, similarity, experts):
  z = {name: similarity[f'E{experts}_{name}'] for name in (
      'labels', 'cosine', 'neg_euclid', 'top_cosine', 'top_neg_euclid')}
  centres = chooser_core.centres(layer['wi'], z['labels'])
  cosine = scores(chooser_core.cosine(centres), layer['x'], 'unit_linear')
  np.testing.assert_allclose(cosine, z['cosine'], atol=1e-5)
  _same_sets(cosine, z['cosine'], z['top_cosine'])
  near = scores(chooser_core.published_euclid(centres), layer['x'], 'unit_linear')
  np.testing.assert_allclose(-np.sqrt(1 - 2 * np.asarray(near)), z['neg_euclid'], atol=1e-5)
  _same_sets(near, z['neg_euclid'], z['top_neg_euclid'])


def test_average_gate_is_the_mean_of_the_gates(layer):
  labels = np.arange(128) % 4
  bias = np.linspace(-1, 1, 128, dtype=np.float32)
  router = chooser_core.average_gate(layer['wi'], labels, bias)
  gates = layer['x'] @ layer['wi'] + bias
  want = np.stack([gates[:, labels == e].mean(1) for e in range(4)], 1)
  np.testing.assert_allclose(scores(router, layer['x'], 'linear'), want, atol=1e-5)
  assert set(chooser_core.average_gate(layer['wi'], labels)) == {'kernel'}


def test_representatives_are_cmoes():
  z = np.load(VECTORS / 'cmoe_swiglu.npz')
  router = chooser_core.representatives(z['Wg'].T, z['Wu'].T, z['representatives'])
  got = jax.nn.softmax(scores(router, z['x'].reshape(-1, 32), 'swiglu'), -1)
  np.testing.assert_allclose(got, z['router_probs'].reshape(-1, 6), atol=1e-5)


def test_activation_mass(layer):
  z = np.load(VECTORS / 'mlp_router_sparse_E16.npz')
  hidden = z['x_unit'] @ layer['wi']
  got = chooser_core.activation_mass(hidden, z['labels'], 16)
  np.testing.assert_allclose(got, z['scores'], atol=1e-6)
  own = np.eye(16)[z['labels']]
  for form, of in (('abs', np.abs), ('square', np.square)):
    got = chooser_core.activation_mass(hidden, z['labels'], 16, form)
    np.testing.assert_allclose(got, of(hidden) @ own, rtol=1e-5, atol=1e-6)
  with pytest.raises(UserError, match=r"form = 'absolute'.*one of"):
    chooser_core.activation_mass(hidden, z['labels'], 16, 'absolute')


def test_masked_forward_takes_the_best_by_mass(layer):
  z = np.load(VECTORS / 'masked_forward_sparse_E16.npz')
  hidden = np.maximum(z['x'].reshape(-1, 32) @ layer['wi'], 0)
  mass = chooser_core.activation_mass(hidden, z['labels'], 16)
  np.testing.assert_allclose(mass, z['gt_scores'], rtol=1e-5, atol=1e-5)
  for k in (1, 3, 4, 8, 16):
    mask = np.asarray(top(mass, k=k))[:, z['labels']]
    y = (hidden * mask) @ layer['wo']
    np.testing.assert_allclose(y, z[f'gt_k{k}_y'].reshape(-1, 32), atol=1e-5)


def test_output_norms(layer, derived):
  got = chooser_core.output_norms(layer['hidden'], layer['wo'], derived['labels'])
  want = derived['expert_output_l2']
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
  factors = chooser_core.output_factors(layer['wo'], derived['labels'])
  pieces = [chooser_core.norms_by_factors(h, *factors) for h in np.split(layer['hidden'], [400])]
  np.testing.assert_allclose(np.concatenate(pieces), got, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('experts', [1, 3])
def test_output_norms_of_uneven_and_of_large_experts(layer, experts):
  labels = np.random.default_rng(0).permutation(np.minimum(np.arange(128) // 20, experts - 1))
  got = chooser_core.output_norms(layer['hidden'], layer['wo'], labels)
  want = np.stack([
      np.linalg.norm(layer['hidden'].astype(float)[:, own] @ layer['wo'][own], axis=1)
      for own in (labels == e for e in range(experts))
  ], 1)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_mass_recall_is_the_published_one(layer, similarity):
  z = np.load(VECTORS / 'mlp_router_sparse_E16.npz')
  held, k = slice(*z['eval_rows']), int(z['k'])
  x, mass = z['x_unit'][held], z['scores'][held]
  centres = chooser_core.centres(layer['wi'], z['labels'])
  mlp = lambda w0, w2: ({'kernel': w0.T, 'out': w2.T}, 'mlp')
  for name, (params, kind) in {
      'init': mlp(z['init_w0'], z['init_w2']),
      'ref_final': mlp(z['refrun_final_w0'], z['refrun_final_w2']),
      'cosine': (chooser_core.cosine(centres), 'unit_linear'),
      'neg_euclid': (chooser_core.published_euclid(centres), 'unit_linear'),
  }.items():
    got = chooser_core.mass_recall(scores(params, x, kind), mass, k)
    assert got == pytest.approx(float(z[f'recall_{name}']), abs=1e-4), name
  assert chooser_core.mass_recall(mass, mass, k) == pytest.approx(z['recall_oracle'], abs=1e-4)


def test_tokens_without_mass_do_not_count():
  mass = np.array([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
  assert chooser_core.mass_recall(np.array([[0.0, 1.0, 0.5]] * 2), mass, 1) == pytest.approx(0.25)
  assert chooser_core.mass_recall(mass, mass * 0, 1) == 1.0
  with pytest.raises(UserError, match='k = 4 of 3 experts'):
    chooser_core.mass_recall(mass, mass, 4)


def test_mean_fill_is_the_recorded_one(layer, derived):
  labels, mean = derived['labels'], derived['mean_activation']
  deviation = chooser_core.deviation_mass(layer['hidden'], mean, labels, 16)
  np.testing.assert_allclose(deviation, derived['gmoe_scores_square'], rtol=1e-4, atol=1e-6)
  mask = np.asarray(top(deviation, k=3))
  want = np.zeros_like(mask)
  np.put_along_axis(want, derived['gmoe_top3'], True, axis=1)
  np.testing.assert_array_equal(mask, want)
  fill = chooser_core.mean_fill(layer['wo'], mean, labels)
  y = (layer['hidden'] * mask[:, labels]) @ layer['wo'] + (1 - mask) @ fill
  np.testing.assert_allclose(y, derived['gmoe_y_meanfill'], rtol=1e-4, atol=1e-5)


def test_deviations_may_be_absolute(layer, derived):
  labels, mean = derived['labels'], derived['mean_activation']
  got = chooser_core.deviation_mass(layer['hidden'], mean, labels, 16, 'abs')
  want = np.abs(layer['hidden'] - mean) @ np.eye(16)[labels]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  with pytest.raises(UserError, match='deviations have either sign'):
    chooser_core.deviation_mass(layer['hidden'], mean, labels, 16, 'relu')
