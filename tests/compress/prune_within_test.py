"""Hidden units and n of m weights dropped inside of experts, by what tokens and gates give them."""

import dataclasses
from pathlib import Path
import sys

import jax
import numpy as np
import pytest

import moejax
from moejax import account, convert, tree
from moejax.compress import compress, dry_run, prune_units, prune_weights, stats
from moejax.errors import UserError
from moejax.model import Model

sys.path.insert(0, str(Path(__file__).parent))
import small_models as small

pytestmark = pytest.mark.once

D, F = 16, 24


class Context:
  """A layer's context with tokens of our own."""

  def __init__(self, config, inputs, gates):
    self.config, self.num_experts, self.act = config, len(inputs), config.act
    self._inputs, self._gates = inputs, gates

  def inputs(self, experts):
    return (self._inputs[e] for e in experts)

  def gates(self, experts):
    return (self._gates[e] for e in experts)

  def group(self, experts, make):
    return make()


class Source:

  def __init__(self, leaves):
    self._leaves = leaves

  def paths(self):
    return tuple(self._leaves)

  def read_expert(self, path, index):
    return self._leaves[path][index]


def layer_of(step, experts=2, gated=True):
  """One layer through a step: (weights before, after, inputs, gates)."""
  rng = np.random.default_rng(0)
  names = ('wi', 'gate') if gated else ('wi',)
  leaves = {f'l/experts/{n}': rng.normal(size=(experts, D, F)).astype('f4') for n in names}
  leaves['l/experts/wo'] = rng.normal(size=(experts, F, D)).astype('f4')
  inputs = [rng.normal(size=(9 * e, D)).astype('f4') for e in range(experts)]
  gates = [rng.random(9 * e).astype('f4') for e in range(experts)]
  config = dataclasses.replace(small.CONFIGS['mixtral'], activation='silu')
  groups = list(step.layer({}, 'l', Source(leaves), Context(config, inputs, gates)))
  after = {n: np.concatenate([np.asarray(g.parts[n][0].weight) for g in groups])
           for n in groups[0].parts}
  before = {path.rpartition('/')[2]: leaf for path, leaf in leaves.items()}
  return before, after, inputs, gates, [row for g in groups for row in g.rows]


def hidden(w, x):
  up = x.astype(np.float64) @ w['gate']
  return up / (1 + np.exp(-up)) * (x @ w['wi'])


def test_units_of_the_definition():
  before, after, inputs, gates, rows = layer_of(prune_units(10))
  for e in range(2):
    own = {n: w[e].astype(np.float64) for n, w in before.items()}
    h = hidden(own, inputs[e]) * gates[e][:, None]
    size = np.sqrt((h**2).sum(0)) if len(h) else np.ones(F)  # no token: by weights alone
    score = np.linalg.norm(own['wo'], axis=1) * size
    kept = np.sort(np.argsort(-score)[:10])
    np.testing.assert_array_equal(after['wi'][e], before['wi'][e][:, kept])
    np.testing.assert_array_equal(after['gate'][e], before['gate'][e][:, kept])
    np.testing.assert_array_equal(after['wo'][e], before['wo'][e][kept])
  assert rows[0]['tokens'] == 0 and rows[0]['relative_output_error'] is None
  assert 0 < rows[1]['relative_output_error'] < 1


@pytest.mark.parametrize('n, m', ((2, 4), (1, 8)))
def test_n_of_m_of_the_definition(n, m):
  before, after, inputs, gates, rows = layer_of(prune_weights(n, m))
  own = {name: w[1].astype(np.float64) for name, w in before.items()}
  sizes = {
      'wi': inputs[1] * gates[1][:, None], 'gate': inputs[1] * gates[1][:, None],
      'wo': hidden(own, inputs[1]) * gates[1][:, None],
  }
  for name, w in own.items():
    score = np.abs(w) * np.sqrt((sizes[name] ** 2).sum(0))[:, None]
    for column in range(w.shape[1]):
      for start in range(0, w.shape[0], m):
        kept = np.sort(np.argsort(-score[start : start + m, column])[:n]) + start
        block = np.flatnonzero(after[name][1][start : start + m, column]) + start
        np.testing.assert_array_equal(block, kept)
        np.testing.assert_array_equal(after[name][1][kept, column], before[name][1][kept, column])
  assert rows[1]['zeros'] == pytest.approx(1 - n / m)


def test_gates_are_those_of_the_router():
  model, batches = small.model('olmoe'), small.batches('olmoe')
  seen = []

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Spy(type(prune_weights())):

    def _pruned(self, expert, x_md, gate_m, context):
      seen.append((len(x_md), float(gate_m.sum(dtype=np.float64))))
      return super()._pruned(expert, x_md, gate_m, context)

  spy = Spy(n=4, m=4, layers='decoder/layers_0/.*', expert_group=8)
  compress(model, spy, batches)
  sums = stats.measure(model, batches, ('routing',)).of('decoder/layers_0/ffn')
  tokens, gates = zip(*seen)
  np.testing.assert_array_equal(tokens, sums['tokens'])
  np.testing.assert_allclose(gates, sums['gate'], rtol=1e-5)


@pytest.mark.long(but=('qwen2_moe',))
@pytest.mark.parametrize('family', ('switch', 'qwen2_moe'))
def test_units_that_add_nothing_go_without_a_trace(family, tmp_path):
  model = small.model(family)
  flat = tree.flatten(model.params)
  for path in [p for p in flat if p.endswith('/experts/wo')]:
    dead = np.array(flat[path])
    dead[:, 1::2] = 0
    flat[path] = jax.numpy.asarray(dead)
  model = Model(model.config, tree.unflatten(flat))
  step = prune_units(ratio=0.5)
  result = compress(model, step, small.batches(family))
  made = result.model
  assert made.config.moe.d_ff == (model.config.moe.d_ff or F) // 2
  np.testing.assert_allclose(small.logits(made, family), small.logits(model, family), atol=2e-5)
  wanted = {p: a.shape for p, a in tree.flatten(moejax.abstract_params(made.config)).items()}
  assert {p: a.shape for p, a in tree.flatten(made.params).items()} == wanted
  assert dry_run(model, step)['after'] == {**result.report['after'], 'loss': None}
  made.save(tmp_path / 'made')
  jax.tree.map(np.testing.assert_array_equal, Model.load(tmp_path / 'made').params, made.params)
  if family == 'switch':
    with pytest.raises(UserError, match='width of its dense layers, 24'):
      convert.to_hf(made, tmp_path / 'hf')


def test_they_chain(tmp_path):
  model, batches = small.model('mixtral'), small.batches('mixtral')
  model.save(tmp_path / 'model')
  step = moejax.chain(
      moejax.prune('reap', experts=4), prune_units(16), prune_weights(), moejax.quantize(4)
  )
  result = compress(tmp_path / 'model', step, batches, tmp_path / 'out')
  made = Model.load(tmp_path / 'out')
  wi = tree.get(made.params, 'decoder/layers_1/ffn/experts/wi')
  assert wi.shape == (4, D, 16) and made.config.moe.num_experts == 4
  assert result.report['after'] == {**account.summary(made.params, made.config), 'loss': None}
  assert np.isfinite(small.logits(made, 'mixtral')).all()


def test_half_of_the_weights_are_zero():
  model = small.model('switch')
  made = compress(model, prune_weights(), small.batches('switch')).model
  experts = lambda m: {p: a for p, a in tree.flatten(m.params).items() if '/experts/' in p}
  assert account.nonzeros(experts(made)) * 2 == account.nonzeros(experts(model))


@pytest.mark.parametrize('make, message', (
    (lambda: prune_units(), 'give one of units and ratio'),
    (lambda: prune_units(ratio=1.0), 'the share that goes'),
    (lambda: prune_units(0), '0 units of 24: between 1 and 24'),
    (lambda: prune_units(25), '25 units of 24'),
    (lambda: prune_weights(5, 4), '1 <= n <= m'),
    (lambda: prune_weights(1, 7), 'm = 7 does not divide them'),
    (lambda: prune_weights(expert_group=0), 'at least 1'),
    (lambda: moejax.chain(moejax.quantize(4), prune_weights()), 'takes uncompressed weights'),
))
def test_what_does_not_fit(make, message):
  model = small.model('mixtral')
  with pytest.raises(UserError, match=message):
    compress(model, make(), small.batches('mixtral'))
