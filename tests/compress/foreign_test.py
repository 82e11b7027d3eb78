"""compress_tree on models that know nothing of moejax: one in plain jnp, one in Flax NNX."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import weights
from moejax.compress import base, foreign, quantize
from moejax.errors import UserError

EXPERTS, D, F = 4, 16, 24


def plain_params():
  """Two layers; w_in [e, d, f], w_out stored as [e, out, in] as PyTorch would."""
  keys = jax.random.split(jax.random.key(0), 6)
  layer = lambda a, b, c: {
      'router': jax.random.normal(a, (D, EXPERTS)),
      'w_in': jax.random.normal(b, (EXPERTS, D, F)) * D**-0.5,
      'w_out': jax.random.normal(c, (EXPERTS, D, F)) * F**-0.5,
  }
  return {'layers': [layer(*keys[:3]), layer(*keys[3:])]}


def plain_apply(params, x, capture=None):
  """Top-2 routing, SiLU, weighted sum."""
  for i, layer in enumerate(params['layers']):
    probs = jax.nn.softmax(x @ layer['router'])
    gate, choice = jax.lax.top_k(probs, 2)
    if capture:
      capture(f'layers/{i}/w_in', x, choice)
    hidden = jax.nn.silu(jnp.einsum('md,edf->emf', x, layer['w_in']))
    if capture:
      mask = (choice[None] == jnp.arange(EXPERTS)[:, None, None]).any(-1)
      capture.dense(f'layers/{i}/w_out', hidden, mask)
    y = jnp.einsum('emf,edf->emd', hidden, layer['w_out'])
    x = x + sum(gate[:, k, None] * y[choice[:, k], jnp.arange(len(x))] for k in range(2))
  return x


RULES = [
    foreign.ExpertRule(pattern=r'layers/\d+/w_in'),
    foreign.ExpertRule(pattern=r'layers/\d+/w_out', axes=('expert', 'out', 'in')),
]


def inputs(seed, count=2):
  return [jax.random.normal(k, (200, D)) for k in jax.random.split(jax.random.key(seed), count)]


def output_error(params, reference):
  x = inputs(9)[0]
  want = plain_apply(reference, x)
  return float(jnp.sum((plain_apply(params, x) - want) ** 2) / jnp.sum((want - x) ** 2))


def test_plain_jnp_model():
  params = plain_params()
  gptq = foreign.compress_tree(params, RULES, plain_apply, inputs(1))
  rtn = foreign.compress_tree(
      params, RULES, plain_apply, inputs(1), quantize.quantize(method='rtn', refit=False)
  )
  assert output_error(gptq.params, params) < 0.8 * output_error(rtn.params, params)
  assert set(gptq.nodes) == {f'layers/{i}/{w}' for i in (0, 1) for w in ('w_in', 'w_out')}
  node = gptq.nodes['layers/1/w_out']
  assert isinstance(node, weights.Ternary) and node.shape == (EXPERTS, F, D)
  np.testing.assert_array_equal(
      np.swapaxes(node.dense(jnp.float32), 1, 2), gptq.params['layers'][1]['w_out']
  )
  np.testing.assert_array_equal(
      gptq.params['layers'][0]['router'], params['layers'][0]['router']
  )
  assert all(row['tokens'] > 0 and row['fallback'] == '' for row in gptq.rows)


def test_captured_inputs_are_those_of_the_compressed_model():
  """Two leaves in one call: the second's Hessian follows the first's compressed output."""
  params, (x,) = plain_params(), inputs(1, 1)
  four = quantize.quantize(4, expert_group=3)
  sequential = foreign.compress_tree(params, RULES, plain_apply, [x], four)
  at_once = foreign.compress_tree(params, RULES, plain_apply, [x], four, sequential=False)
  first = 'layers/0/w_in'
  np.testing.assert_array_equal(
      sequential.nodes[first].symbols(), at_once.nodes[first].symbols()
  )
  assert (
      sequential.nodes['layers/1/w_out'].symbols() != at_once.nodes['layers/1/w_out'].symbols()
  ).any()
  assert output_error(sequential.params, params) < 0.05


def test_hessians_exist_for_one_group_only(monkeypatch):
  """Groups of one give what one group of all gives, with a quarter of the Hessians alive."""
  params, batches = plain_params(), inputs(1)
  kept = []
  start = foreign._Grams.start

  def watch(self, path, experts):
    start(self, path, experts)
    arrays = [a for a in vars(self).values() if isinstance(a, np.ndarray) and a.ndim > 2]
    kept.append(sum(a.size for a in arrays))

  monkeypatch.setattr(foreign._Grams, 'start', watch)
  made = {
      size: foreign.compress_tree(params, RULES, plain_apply, batches, quantize.quantize(
          2, expert_group=size)) for size in (EXPERTS, 1)
  }
  for path, node in made[1].nodes.items():
    np.testing.assert_array_equal(node.symbols(), made[EXPERTS].nodes[path].symbols())
  floats = ('relative_output_error', 'error_before_refit')  # sums in another order
  for one, whole in zip(made[1].rows, made[EXPERTS].rows, strict=True):
    np.testing.assert_allclose([one[k] for k in floats], [whole[k] for k in floats], rtol=1e-5)
    rest = [{k: v for k, v in row.items() if k not in floats} for row in (one, whole)]
    assert rest[0] == rest[1]
  leaves = [D * D, F * F] * 2
  assert kept == [EXPERTS * n for n in leaves] + [n for n in leaves for _ in range(EXPERTS)]


class Experts(nnx.Module):
  """Somebody's NNX mixture: top-1, dispatched by one-hot."""

  def __init__(self, rngs: nnx.Rngs):
    normal = jax.random.normal
    self.router = nnx.Linear(D, EXPERTS, rngs=rngs)
    self.up = nnx.Param(normal(rngs.params(), (EXPERTS, D, F)) * D**-0.5)
    self.down = nnx.Param(normal(rngs.params(), (EXPERTS, F, D)) * F**-0.5)

  def __call__(self, x, tap=None):
    choice = jnp.argmax(self.router(x), -1)
    hidden = jax.nn.relu(jnp.einsum('md,mdf->mf', x, self.up[...][choice]))
    if tap:
      tap('up', x, choice)
      tap('down', hidden, choice)
    return x + jnp.einsum('mf,mfd->md', hidden, self.down[...][choice])


def test_flax_nnx_model():
  graph, state = nnx.split(Experts(nnx.Rngs(0)))
  params = nnx.to_pure_dict(state)

  def rebuild(params):
    filled = nnx.clone(nnx.merge(graph, state))
    nnx.update(filled, params)
    return filled

  run = lambda params, x, capture: rebuild(params)(x, tap=capture)
  rules = [foreign.ExpertRule(pattern='up|down')]
  result = foreign.compress_tree(params, rules, run, inputs(2), quantize.quantize(3))
  x = inputs(3)[0]
  want, got = run(params, x, None), run(result.params, x, None)
  error = jnp.sum((got - want) ** 2) / jnp.sum((want - x) ** 2)
  assert 0 < error < 0.1
  assert result.nodes['up'].bits_per_weight() == 6


def test_bad_use():
  params = plain_params()
  run = lambda rules, fn=plain_apply, batches=None: foreign.compress_tree(
      params, rules, fn, inputs(1, 1) if batches is None else batches
  )
  with pytest.raises(UserError, match='matches no leaf'):
    run([foreign.ExpertRule(pattern='layers/0/w_inn')])
  with pytest.raises(UserError, match='gives layers/0/router axes'):
    run([foreign.ExpertRule(pattern='layers/0/router')])
  with pytest.raises(UserError, match='no rule names'):
    run(RULES[:1])
  with pytest.raises(UserError, match='never called capture'):
    run([*RULES, foreign.ExpertRule(pattern='layers/0/router', axes=('in', 'out'))])
  with pytest.raises(UserError, match='under jit'):
    run(RULES, lambda p, x, c: jax.jit(lambda p, x: plain_apply(p, x, c))(p, x))
  with pytest.raises(UserError, match='no batch'):
    run(RULES, batches=[])
  with pytest.raises(UserError, match='input has shape'):
    run(RULES, lambda p, x, c: c('layers/0/w_in', x[:, :3]))
  for transform, message in (
      (base.chain(quantize.quantize(2)), 'takes one quantize'),
      (quantize.quantize(layers='decoder/.*'), 'knows no layers'),
      (quantize.quantize(true_sequential=True), 'true_sequential'),
  ):
    with pytest.raises(UserError, match=message):
      foreign.compress_tree(params, RULES, plain_apply, inputs(1, 1), transform)
  with pytest.raises(UserError, match='once each'):
    foreign.ExpertRule(pattern='x', axes=('in', 'in', 'out'))
