"""Activity of a layer in pieces: recorded statistics, cases by hand, and that cuts do not count."""

from pathlib import Path

import numpy as np
import pytest

from moejax.compress import chooser_core, profile_core
from moejax.errors import UserError

VECTORS = Path(__file__).parents[1] / 'vectors' / 'moefication'


@pytest.fixture(scope='module')
def derived():
  return np.load(VECTORS / 'derived_sparse_E16.npz')


@pytest.fixture(scope='module')
def hidden():
  z = np.load(VECTORS / 'fixture_sparse.npz')
  return np.maximum(z['X'] @ z['W1'].T, 0)


def _profile(pieces, **kwargs):
  profile = profile_core.empty(128, **kwargs)
  for piece in pieces:
    profile = profile_core.add(profile, piece)
  return profile


def test_statistics_are_the_recorded_ones(derived, hidden):
  got = profile_core.finish(_profile([hidden]))
  assert got.tokens == 1003 and got.zero_tokens == 28 == (derived['active_count'] == 0).sum()
  assert got.active == pytest.approx(float(derived['active_fraction_mean']), rel=1e-6)
  np.testing.assert_allclose(got.rate_f, derived['neuron_active_rate'], rtol=1e-4)
  np.testing.assert_allclose(got.mean_f, derived['mean_activation'], rtol=1e-4)
  assert got.hoyer == pytest.approx(derived['square_hoyer'].mean(), rel=1e-4)
  want = np.percentile(
      derived['active_count'] / 128, profile_core.PERCENTILES, method='inverted_cdf'
  )
  np.testing.assert_allclose([got.percentiles[p] for p in profile_core.PERCENTILES], want)
  counts = np.bincount(derived['active_count'], minlength=129)
  np.testing.assert_array_equal(_profile([hidden]).count_c, counts)
  assert got.best_e is None


def test_square_hoyer_of_each_token(derived, hidden):
  for token in (0, 5, int((derived['active_count'] == 0).argmax())):
    got = profile_core.finish(_profile([hidden[token : token + 1]]))
    assert got.hoyer == pytest.approx(derived['square_hoyer'][token], rel=1e-4)


@pytest.mark.parametrize('cuts', [[1, 2, 3], [512], [100, 100, 700, 1002], range(0, 1003, 64)])
def test_cuts_do_not_count(derived, hidden, cuts):
  labels = derived['labels']
  whole = _profile([hidden], labels_f=labels)
  parts = _profile(np.split(hidden, cuts), labels_f=labels)
  np.testing.assert_array_equal(parts.count_c, whole.count_c)
  np.testing.assert_array_equal(parts.active_f, whole.active_f)
  for name in ('hidden_f', 'share_e', 'hoyer'):
    np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-5)


def test_memory_is_that_of_the_neurons(derived, hidden):
  size = lambda p: sum(a.size for a in vars(p).values() if isinstance(a, np.ndarray))
  few = _profile([hidden[:8]], labels_f=derived['labels'])
  many = _profile([hidden] * 3, labels_f=derived['labels'])
  assert size(few) == size(many) <= 5 * 128 and many.tokens == 3009


def test_mass_of_the_best_experts(derived, hidden):
  labels = derived['labels']
  got = profile_core.finish(_profile(np.split(hidden, 17), labels_f=labels)).best_e
  mass = np.asarray(chooser_core.activation_mass(hidden, labels, 16))
  for k in (1, 3, 16):
    assert got[k - 1] == pytest.approx(chooser_core.mass_recall(mass, mass, k), abs=1e-5)
  assert got[-1] == pytest.approx(1.0) and (np.diff(got) >= 0).all()


def test_smooth_activations_count_by_size():
  h = np.zeros((4, 128), np.float32)
  h[0, :4] = [-3.0, 0.05, 1.0, 0.2]
  h[1, :2] = [-0.05, 0.1]
  h[2] = 1e25
  got = profile_core.finish(_profile([h], threshold=0.1), percentiles=(0, 25, 50, 51, 75, 76, 100))
  assert got.zero_tokens == 2
  assert got.active == pytest.approx((3 + 0 + 128 + 0) / 4 / 128)
  assert got.percentiles == pytest.approx(
      {0: 0, 25: 0, 50: 0, 51: 3 / 128, 75: 3 / 128, 76: 1, 100: 1}
  )
  hoyer = [4.25**2 / (9 + 0.05**2 + 1 + 0.04), 0.15**2 / 0.0125, 128, 0]
  assert got.hoyer == pytest.approx(np.mean(hoyer), rel=1e-5)
  assert profile_core.finish(_profile([h])).zero_tokens == 1


def test_what_cannot_be_profiled(hidden):
  with pytest.raises(UserError, match='no tokens were profiled'):
    profile_core.finish(_profile([hidden[:0]]))
  with pytest.raises(UserError, match='activations of 12 neurons for a profile of 128'):
    profile_core.add(profile_core.empty(128), hidden[:, :12])
  with pytest.raises(UserError, match='labels of 4 neurons for a layer of 128'):
    profile_core.empty(128, labels_f=np.zeros(4, int))
  with pytest.raises(UserError, match=r'threshold = -1: at least 0'):
    profile_core.empty(128, threshold=-1)
  bad = hidden[:5].copy()
  bad[2, 7] = np.nan
  with pytest.raises(UserError, match=r'activations of 1 neurons are not finite: \[7\]'):
    profile_core.add(profile_core.empty(128), bad)
