"""compress_tree prunes and merges models that know nothing of moejax, as our own are."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax import compress as compress_lib
from moejax.compress import foreign
from moejax.compress.merge import merge
from moejax.compress.prune import prune
from moejax.errors import UserError

pytestmark = pytest.mark.once

EXPERTS, D, F, TOP_K = 6, 16, 24, 2


def plain_params(copies=False):
  """Two gated layers, PyTorch's layout for w_out; with copies, experts 3 to 5 are 0 to 2 turned."""
  rng = np.random.default_rng(0)
  layers = []
  for _ in range(2):
    w = {n: rng.normal(size=(EXPERTS, D, F)) * D**-0.5 for n in ('w_in', 'w_gate', 'w_out')}
    router = rng.normal(size=(D, EXPERTS))
    if copies:
      for e in range(3):
        turn = rng.permutation(F)
        for leaf in w.values():
          leaf[e + 3] = leaf[e][:, turn]
        router[:, e + 3] = router[:, e] * 0.5
    layers.append(jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), {'router': router, **w}))
  return {'layers': layers}


def plain_apply(params, x, capture=None, maps=None):
  """Top-2 of a softmax over all, SwiGLU; as many experts as the params hold."""
  for i, layer in enumerate(params['layers']):
    logits = x @ layer['router']
    gate, choice = jax.lax.top_k(jax.nn.softmax(logits), TOP_K)
    if capture:
      capture(f'layers/{i}/w_in', x, choice, gate_mk=gate, logits_me=logits)
    if maps is not None:
      choice = jnp.asarray(maps[f'layers/{i}'])[choice]
    hidden = jnp.einsum('md,edf->emf', x, layer['w_in'])
    hidden *= jax.nn.silu(jnp.einsum('md,edf->emf', x, layer['w_gate']))
    y = jnp.einsum('emf,edf->emd', hidden, layer['w_out'])
    x = x + sum(gate[:, k, None] * y[choice[:, k], jnp.arange(len(x))] for k in range(TOP_K))
  return x


RULES = [
    foreign.ExpertRule(pattern=r'layers/\d+/w_in', role='wi'),
    foreign.ExpertRule(pattern=r'layers/\d+/w_gate', role='gate'),
    foreign.ExpertRule(pattern=r'layers/\d+/w_out', axes=('expert', 'out', 'in'), role='wo'),
    foreign.ExpertRule(pattern=r'(layers/\d+)/router', axes=('in', 'expert'),
                       role='router/kernel'),
]


def inputs(count=2):
  return [jax.random.normal(k, (200, D)) for k in jax.random.split(jax.random.key(7), count)]


def shrink(step, params=None, batches=None, **settings):
  return foreign.compress_tree(
      plain_params() if params is None else params, RULES, plain_apply, batches or inputs(), step,
      **{'activation': 'silu', **settings},
  )


def by_hand(method):
  """Scores of the first layer's experts, straight from their definitions."""
  params = plain_params()['layers'][0]
  x = np.concatenate(inputs())
  logits = x @ np.asarray(params['router'])
  gate, choice = jax.lax.top_k(jax.nn.softmax(jnp.asarray(logits)), TOP_K)
  score = np.zeros(EXPERTS)
  for e in range(EXPERTS):
    rows, place = np.nonzero(np.asarray(choice) == e)
    hidden = np.asarray(jax.nn.silu(x[rows] @ params['w_gate'][e])) * (x[rows] @ params['w_in'][e])
    norm = np.linalg.norm(hidden @ np.asarray(params['w_out'][e]).T, axis=1)
    score[e] = {
        'frequency': len(rows), 'ean': norm.sum(),
        'reap': (norm * np.asarray(gate)[rows, place]).mean(),
    }[method]
  return score


@pytest.mark.parametrize('method', ('reap', 'ean', 'frequency'))
def test_pruning_keeps_the_experts_of_the_definition(method):
  params = plain_params()
  result = shrink(prune(method, experts=3))
  want = np.sort(np.argsort(-by_hand(method))[:3])
  row = result.rows[0]
  assert row['path'] == 'layers/0' and row['kept'] == want.tolist()
  np.testing.assert_allclose(row['scores'], by_hand(method), rtol=1e-4)
  for name in ('w_in', 'w_gate', 'w_out'):
    np.testing.assert_array_equal(
        result.params['layers'][0][name], params['layers'][0][name][want]
    )
  np.testing.assert_array_equal(
      result.params['layers'][0]['router'], params['layers'][0]['router'][:, want]
  )
  assert np.isfinite(plain_apply(result.params, inputs()[0])).all()


def test_copies_merge_without_loss_and_only_aligned():
  """Experts that are turned copies of others merge into them, seen from the outside."""
  params, x = plain_params(copies=True), inputs()[0]
  want = plain_apply(params, x)
  step = merge(3, similarity='router-weight', budget='uniform')
  made = shrink(step, params)
  assert all(len(m) == EXPERTS and m.max() == 2 for m in made.maps.values())
  assert all((m[:3] == m[3:]).all() for m in made.maps.values())
  assert made.params['layers'][1]['w_out'].shape == (3, D, F)
  np.testing.assert_allclose(
      plain_apply(made.params, x, maps=made.maps), want, atol=1e-4, rtol=1e-4
  )
  loose = shrink(dataclasses.replace(step, alignment='none'), params)
  assert float(jnp.abs(plain_apply(loose.params, x, maps=loose.maps) - want).max()) > 0.1


@pytest.mark.parametrize('step', (
    merge(3), compress_lib.hc_smoe(3), compress_lib.ream(3), compress_lib.uncurl(3),
    merge(3, budget='uniform', operator='least_squares', router='slice'),
    merge(3, similarity='feature-correlation.lsa', alignment='activations', budget='uniform'),
    prune('random', experts=4), prune('aimer', experts=4),
    prune('reap', experts=3, budget='global', at_least=2),
), ids=lambda step: getattr(step, 'method', getattr(step, 'grouping', '')) + step.name)
def test_every_method(step):
  result = shrink(step)
  held = [layer['w_in'].shape[0] for layer in result.params['layers']]
  assert sum(held) in (6, 8) and result.rows[0]['path'] == 'layers/0'
  for layer in result.params['layers']:
    assert layer['w_gate'].shape[0] == layer['w_out'].shape[0] == layer['w_in'].shape[0]
  x = inputs()[0]
  y = plain_apply(result.params, x, maps=result.maps or None)
  assert np.isfinite(y).all() and not np.allclose(y, plain_apply(plain_params(), x))
  again = shrink(step)
  jax.tree.map(np.testing.assert_array_equal, result.params, again.params)


def test_masked_tokens_count_nowhere():
  x = inputs(1)[0]
  padded = jnp.concatenate([x, 9 * jnp.ones((50, D))])

  def masked(params, x, capture):
    tell = lambda path, x, e, **says: capture(path, x, e, jnp.arange(len(x)) < 200, **says)
    plain_apply(params, x, tell)

  for step in (merge(3, budget='uniform'), compress_lib.ream(3), prune('reap', experts=3)):
    one = shrink(step, batches=[x])
    two = foreign.compress_tree(
        plain_params(), RULES, masked, [padded], step, activation='silu'
    )
    names = [name for name in ('members', 'kept') if name in one.rows[0]]
    first = lambda result: [r[n] for r in result.rows if r['path'] == 'layers/0' for n in names]
    assert names and first(one) == first(two)


def test_one_layer_of_them():
  result = shrink(prune('frequency', experts=2, layers='layers/1'))
  assert [layer['w_in'].shape[0] for layer in result.params['layers']] == [EXPERTS, 2]


def test_then_quantized():
  """The same rules serve both: routers are left as they are."""
  small = shrink(prune('reap', experts=3))
  apply = lambda p, x, c: plain_apply(p, x, lambda path, x, e, **_: [
      c(path.replace('w_in', n), x, e) for n in ('w_in', 'w_gate')
  ])
  rules = [rule for rule in RULES if rule.role != 'wo']
  packed = foreign.compress_tree(small.params, rules, apply, inputs(), moejax.quantize(3))
  assert packed.nodes['layers/0/w_in'].shape == (3, D, F)
  assert set(packed.nodes) == {f'layers/{i}/{n}' for i in (0, 1) for n in ('w_in', 'w_gate')}


class Experts(nnx.Module):
  """Somebody's NNX mixture, top-1, with biases; how many experts its arrays say."""

  def __init__(self, rngs: nnx.Rngs):
    normal = jax.random.normal
    self.router = nnx.Linear(D, EXPERTS, rngs=rngs)
    self.up = nnx.Param(normal(rngs.params(), (EXPERTS, D, F)) * D**-0.5)
    self.up_bias = nnx.Param(normal(rngs.params(), (EXPERTS, F)))
    self.down = nnx.Param(normal(rngs.params(), (EXPERTS, F, D)) * F**-0.5)

  def __call__(self, x, tap=None):
    logits = x @ self.router.kernel[...] + self.router.bias[...][None]
    choice = jnp.argmax(logits, -1)
    if tap:
      tap('up', x, choice, logits_me=logits)
    hidden = jnp.einsum('md,mdf->mf', x, self.up[...][choice]) + self.up_bias[...][choice]
    return x + jnp.einsum('mf,mfd->md', jax.nn.relu(hidden), self.down[...][choice])


def test_flax_nnx_model():
  graph, state = nnx.split(Experts(nnx.Rngs(0)))
  params = nnx.to_pure_dict(state)

  def run(params, x, capture=None):
    filled = nnx.clone(nnx.merge(graph, state))
    nnx.update(filled, params)
    return filled(x, tap=capture)

  rules = [foreign.ExpertRule(pattern=p, axes=axes, role=role) for p, axes, role in (
      ('()up', ('expert', 'in', 'out'), 'wi'), ('()up_bias', ('expert', 'out'), 'wi_bias'),
      ('()down', ('expert', 'in', 'out'), 'wo'), ('()router/kernel', ('in', 'expert'),
      'router/kernel'), ('()router/bias', ('expert',), 'router/bias'),
  )]
  result = foreign.compress_tree(
      params, rules, run, inputs(), prune('frequency', experts=3), activation='relu'
  )
  assert result.params['router']['kernel'].shape == (D, 3)
  assert result.params['router']['bias'].shape == (3,)
  kept = result.rows[0]['kept']
  np.testing.assert_array_equal(result.params['up_bias'], params['up_bias'][np.array(kept)])
  assert np.isfinite(run(result.params, inputs()[0])).all()


def test_bad_use():
  prune_3 = prune('reap', experts=3)
  with pytest.raises(UserError, match="activation = ''"):
    shrink(prune_3, activation='')
  with pytest.raises(UserError, match='has no role'):
    foreign.compress_tree(
        plain_params(), [foreign.ExpertRule(pattern=r'layers/\d+/w_in')], plain_apply, inputs(),
        prune_3, activation='silu',
    )
  with pytest.raises(UserError, match="no leaf of role 'wo'"):
    foreign.compress_tree(
        plain_params(), [*RULES[:2], RULES[3]], plain_apply, inputs(), prune_3, activation='silu'
    )
  with pytest.raises(UserError, match=r"'layers/0' has no leaf of role 'router/kernel'"):
    foreign.compress_tree(
        plain_params(), RULES[:3], plain_apply, inputs(),
        merge(3, similarity='router-weight', router='slice'), activation='silu',
    )
  with pytest.raises(UserError, match='logits_me=...'):
    blind = lambda p, x, c: plain_apply(p, x, lambda path, x, e, **_: c(path, x, e))
    foreign.compress_tree(plain_params(), RULES, blind, inputs(), merge(3), activation='silu')
  for step in (prune_3, compress_lib.ream(3), compress_lib.uncurl(3)):
    with pytest.raises(UserError, match="no leaf of role 'router/kernel'"):
      foreign.compress_tree(
          plain_params(), RULES[:3], plain_apply, inputs(), step, activation='silu'
      )
  no_gates = lambda p, x, c: plain_apply(
      p, x, lambda path, x, e, gate_mk, logits_me: c(path, x, e, logits_me=logits_me)
  )
  with pytest.raises(UserError, match='gate_mk=...'):
    foreign.compress_tree(plain_params(), RULES, no_gates, inputs(), prune_3, activation='silu')
  few = lambda p, x, c: plain_apply(
      p, x, lambda path, x, e, logits_me, **_: c(path, x, e, logits_me=logits_me[:, :4])
  )
  with pytest.raises(UserError, match='the layer has 6 experts'):
    foreign.compress_tree(plain_params(), RULES, few, inputs(), prune_3, activation='silu')
  with pytest.raises(UserError, match='7 experts for layers/0, which has 6'):
    shrink(prune('reap', experts=7))
  with pytest.raises(UserError, match='each token meets top_k = 2'):
    shrink(prune('reap', experts=1))
  with pytest.raises(UserError, match="'naee' needs the router"):
    shrink(prune('naee', experts=3))
  with pytest.raises(UserError, match='matches none of the layers layers/0, layers/1'):
    shrink(prune('reap', experts=3, layers='decoder/.*'))
  with pytest.raises(UserError, match='has .*, in any order'):
    foreign.ExpertRule(pattern='x', axes=('in', 'out'), role='wi')
  with pytest.raises(UserError, match="did you mean 'gate'"):
    foreign.ExpertRule(pattern='x', role='gates')
  bad = lambda p, x, c: plain_apply(p, x, lambda path, x, e, **_: c(path, x, e + 5))
  with pytest.raises(UserError, match='of 6; -1 means none'):
    foreign.compress_tree(plain_params(), RULES, bad, inputs(), prune_3, activation='silu')
