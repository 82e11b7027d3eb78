"""The number of experts of each layer: the predictor, the exact search, and a whole run."""

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest

import moejax
from moejax import Model
from moejax.compress import compress, moefy, shares, shares_core
from moejax.errors import UserError

pytestmark = pytest.mark.once

_SPEC = importlib.util.spec_from_file_location(
    'small_models', Path(__file__).with_name('small_models.py')
)
small = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(small)


def truth(shares_cl):
  return 2.0 + 0.3 / (0.1 + shares_cl[:, 0]) + 0.02 / (0.1 + shares_cl[:, 1])


def test_the_predictor_finds_the_layer_that_matters():
  rng = np.random.default_rng(0)
  some = rng.uniform(0.05, 1, (60, 2))
  predictor = shares_core.fit(some, truth(some))
  others = rng.uniform(0.05, 1, (200, 2))
  assert shares_core.explained(predictor, others, truth(others)) > 0.97
  chosen = shares_core.best(predictor, (16, 16), 16)
  assert chosen.sum() <= 16 and chosen[0] > 10
  random = shares_core.explained(predictor, others, rng.normal(size=200))
  assert random < 0.5


@pytest.mark.parametrize('experts, budget', [((4, 3, 5), 7), ((4, 3, 5), 12), ((6, 6, 2), 3)])
def test_the_search_is_exact(experts, budget):
  rng = np.random.default_rng(budget)
  some = rng.uniform(0.1, 1, (40, 3))
  predictor = shares_core.fit(some, rng.normal(size=40))
  found = shares_core.best(predictor, experts, budget)
  rows = np.array([
      row for row in itertools.product(*(range(1, n + 1) for n in experts)) if sum(row) <= budget
  ])
  losses = predictor(rows / np.array(experts))
  assert found.sum() <= budget
  assert predictor(found[None] / np.array(experts))[0] == pytest.approx(losses.min(), abs=1e-12)


def test_drawn_and_uniform_keep_the_budget():
  rng = np.random.default_rng(0)
  for experts, budget in (((8, 8, 8), 7), ((8, 2, 30), 20), ((4, 4), 8), ((3, 3), 2),
                          ((4, 4, 4, 200), 5)):
    rows = shares_core.drawn(experts, budget, 200, rng)
    assert (rows.sum(1) <= budget).all() and (rows >= 1).all() and (rows <= experts).all()
    uniform = shares_core.uniform(experts, budget)
    assert uniform.sum() <= budget and (uniform >= 1).all() and (uniform <= experts).all()
  assert len({tuple(r) for r in shares_core.drawn((8, 8, 8), 12, 200, rng)}) > 10
  with pytest.raises(UserError, match='at least one each'):
    shares_core.best(shares_core.fit(rng.uniform(0.1, 1, (9, 3)), np.arange(9.0)), (4, 4, 4), 2)
  with pytest.raises(UserError, match='all finite'):
    shares_core.fit(rng.uniform(0.1, 1, (4, 2)), [1.0, np.nan, 2.0, 3.0])


@pytest.mark.long
def test_a_search_over_a_model(tmp_path):
  model, batches = small.model('opt'), small.batches('opt', 4)
  split = compress(model, moefy.moefy(12, share=0.5, choice='cosine'), batches).model
  how = shares.Shares(budget=0.5, measured=12, drawn=200, finalists=3)
  made, report = moejax.search_shares(split, batches[:1], how)
  assert made.config.moe.selection.choices == tuple(report['choices'])
  assert sum(report['choices']) <= 12 and len(report['choices']) == 2
  assert report['uniform']['choices'] == [6, 6]
  assert report['loss'] <= report['uniform']['loss']
  assert report['loss'] == pytest.approx(small.loss(made, 'opt', batches[0]), rel=2e-5)
  split.save(tmp_path / 'split')
  out = tmp_path / 'out'
  none, again = moejax.search_shares(tmp_path / 'split', batches[:1], how, out)
  assert none is None and again == report
  assert Model.load(out).config == made.config
  assert sorted(p.name for p in tmp_path.iterdir()) == ['out', 'split']


@pytest.mark.long
def test_a_killed_search_goes_on(tmp_path, monkeypatch):
  model, batches = small.model('opt'), small.batches('opt', 2)
  split = compress(model, moefy.moefy(6, share=0.5, choice='cosine'), batches).model
  split.save(tmp_path / 'split')
  how = shares.Shares(budget=0.5, measured=10, drawn=50, finalists=1)
  run, count = shares.walker.Walk.run, [0]

  def dies(self):
    count[0] += 1
    if count[0] == 6:
      raise KeyboardInterrupt
    return run(self)

  monkeypatch.setattr(shares.walker.Walk, 'run', dies)
  with pytest.raises(KeyboardInterrupt):
    moejax.search_shares(tmp_path / 'split', batches, how, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
  _, resumed = moejax.search_shares(tmp_path / 'split', batches, how, tmp_path / 'out')
  before = count[0]
  monkeypatch.undo()
  _, whole = moejax.search_shares(tmp_path / 'split', batches, how, tmp_path / 'other')
  assert resumed == whole and before - 6 <= whole['measured'] - 4


def test_bad_requests():
  model, batches = small.model('opt'), small.batches('opt', 1)
  with pytest.raises(UserError, match='no layers split'):
    moejax.search_shares(model, batches)
  split = compress(model, moefy.moefy(6, choice='cosine', share=0.5), batches).model
  with pytest.raises(UserError, match='each runs at least one'):
    moejax.search_shares(split, batches, shares.Shares(budget=0.1))
  dynamic = compress(
      model, moefy.moefy(6, choice='norm', rule='within', epochs=1, share=0.5), batches
  ).model
  with pytest.raises(UserError, match="rule 'top'"):
    moejax.search_shares(dynamic, batches)
  for settings, words in (({'budget': 0.0}, 'budget'), ({'measured': 2}, 'measured = 2')):
    with pytest.raises(UserError, match=words):
      shares.Shares(**settings)
