"""Chosen experts against a loop over tokens and experts, on every path and shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import extension
from kernels_pallas.neuron_select import api, cases, cpu, ref, tpu, vjp

ACTS = {'relu': jax.nn.relu, 'silu': lambda wi, gate: jax.nn.silu(gate) * wi}


def problem(case, gated=False, biased=False, dtype=np.float32):
  rng = np.random.default_rng(case.m * 131 + case.e)
  draw = lambda *shape: (rng.normal(size=shape) * 0.3).astype(dtype)
  experts = {'wi': draw(case.e, case.d, case.f), 'wo': draw(case.e, case.f, case.d)}
  if gated:
    experts['gate'] = draw(case.e, case.d, case.f)
  if biased:
    for name, size in (('wi', case.f), ('gate', case.f), ('wo', case.d)):
      if name in experts:
        experts[f'{name}_bias'] = draw(case.e, size)
  chosen = rng.random((case.m, case.e)) < case.share
  if case.special == 'one':
    chosen[:, 2] = True
  if case.special == 'idle':
    chosen[11] = False
  if case.special == 'alike':
    chosen = np.repeat(chosen[:, ::3], 3, axis=1)
  return draw(case.m, case.d), experts, chosen


def by_loops(x, experts, chosen, act):
  w = {name: np.asarray(a, np.float64) for name, a in experts.items()}
  bias = lambda name, e: w.get(f'{name}_bias', np.zeros((len(chosen[0]), 1)))[e]
  out = np.zeros(x.shape)
  for m, e in zip(*np.nonzero(chosen)):
    row = np.asarray(x[m], np.float64)
    products = [row @ w[name][e] + bias(name, e) for name in ('wi', 'gate') if name in w]
    out[m] += np.asarray(act(*products)) @ w['wo'][e] + bias('wo', e)
  return out


@pytest.mark.long(but=(
    *(f'relu-False-False-{name}' for name in (
        'one_token', 'nothing_chosen', 'an_idle_token', 'half_of_few',
    )),
    *(f'silu-True-True-{name}' for name in (
        'few_tokens', 'everything_chosen', 'tails', 'narrow', 'neighbours_alike', 'many_alike',
    )),
))
@pytest.mark.parametrize('case', cases.CHECKED, ids=lambda c: c.name)
@pytest.mark.parametrize('act, gated, biased', [('relu', False, False), ('silu', True, True)])
def test_every_path_is_the_loop(case, act, gated, biased):
  x, experts, chosen = problem(case, gated, biased)
  want = by_loops(x, experts, chosen, ACTS[act])
  paths = [
      ref.neuron_select, ref.by_pair, ref.by_expert, ref.all_by_expert, ref.all_in_groups,
      ref.everything, *([] if extension.missing() else [cpu.neuron_select]),
  ]
  for path in paths:
    got = jax.jit(lambda x, w, c, path=path: path(x, w, c, ACTS[act]))(x, experts, chosen)
    np.testing.assert_allclose(got, want, atol=2e-5, err_msg=f'{path.__module__}.{path.__name__}')


@pytest.mark.parametrize('tokens, e, share, path', [
    (1, 64, 1.0, 'by_pair'), (4, 64, 0.5, 'by_pair'), (4, 64, 1.0, 'all_by_expert'),
    (32, 64, 0.1, 'by_pair'), (32, 64, 0.5, 'all_by_expert'), (32, 256, 0.5, 'all_in_groups'),
    (33, 64, 0.02, 'by_expert'), (33, 64, 0.5, 'all_in_groups'), (9, 64, 0.0, 'by_pair'),
    (300, 64, 0.0, 'by_expert'),
])
def test_the_path_follows_tokens_and_what_was_chosen(tokens, e, share, path, monkeypatch):
  """Experts of 8 neurons: above 32 tokens the limit is 8 / (8 + 100), below 1.2 / sqrt(tokens)."""
  x, experts, _ = problem(cases.Case('', tokens, e, 16, 8, 0.3))
  chosen = np.arange(tokens * e).reshape(tokens, e) < share * tokens * e
  paths = ('by_pair', 'by_expert', 'all_by_expert', 'all_in_groups')
  for mark, name in enumerate(paths):
    made = lambda x, experts, chosen, act, mark=mark: jnp.full(x.shape, float(mark))
    monkeypatch.setattr(ref, name, made)
  got = ref.neuron_select(x, experts, jnp.asarray(chosen), jax.nn.relu)
  assert paths[int(got[0, 0])] == path


@pytest.mark.skipif(bool(extension.missing()), reason=extension.missing())
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('m, e, f', [(1, 6, 32), (9, 4, 136), (60, 3, 136), (100, 8, 8)])
def test_one_cpu_device_goes_by_products_in_cpp(m, e, f, dtype, monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  x, experts, chosen = problem(cases.Case('', m, e, 48, f, 0.4), gated=True, biased=True)
  want = by_loops(x, experts, chosen, ACTS['silu'])
  x, experts = jax.tree.map(lambda a: jnp.asarray(a, dtype), (x, experts))
  text = jax.jit(lambda *a: api.neuron_select(*a, ACTS['silu'])).lower(x, experts, chosen)
  assert extension.CHOSEN_UP in text.as_text() and extension.CHOSEN_DOWN in text.as_text()
  got = api.neuron_select(x, experts, jnp.asarray(chosen), ACTS['silu'])
  assert got.dtype == dtype
  np.testing.assert_allclose(
      np.float64(got), want, atol=2e-5 if dtype == 'float32' else 0.01 * np.abs(want).max()
  )


@pytest.mark.skipif(bool(extension.missing()), reason=extension.missing())
@pytest.mark.parametrize('share', [0.2, 0.5])
def test_products_in_cpp_read_nothing_of_other_experts_and_tokens(share):
  """What is NaN stays with the pairs that chose it."""
  x, experts, chosen = problem(cases.Case('', 9, 12, 24, 32, share))
  chosen[:, 3] = chosen[4] = False
  x[4] = experts['wi'][3] = experts['wo'][3] = np.nan
  chosen[0, 5], chosen[1:, 5] = True, np.arange(8) % 2 == 0
  experts['wi'][5, :, 2] = np.nan
  got = np.asarray(cpu.neuron_select(jnp.asarray(x), experts, jnp.asarray(chosen), jax.nn.silu))
  assert (np.isnan(got).any(1) == chosen[:, 5]).all()


def test_several_devices_go_by_xla(monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: 2)
  assert 'over devices' in cpu.supports(jnp.float32)


@pytest.mark.skipif(bool(extension.missing()), reason=extension.missing())
def test_a_gate_of_another_type_goes_by_xla(monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  x, experts, chosen = problem(cases.Case('wide', 9, 4, 48, 136, 0.4), gated=True)
  want = by_loops(x, experts, chosen, ACTS['silu'])
  experts['gate'] = experts['gate'].astype(np.float16)
  got = api.neuron_select(jnp.asarray(x), experts, jnp.asarray(chosen), ACTS['silu'])
  np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max())


def test_from_which_share_on_all_experts_are_computed():
  assert ref.all_from(1, 8) == 1.0
  assert ref.all_from(16, 8) == 0.3
  assert ref.all_from(512, 160) == 0.5


@pytest.mark.parametrize('rows, columns, terms', [
    (768, 32, 8), (4096, 1024, 32), (16, 8, 8), (7, 4096, 7), (1, 5, 1), (37, 5, 1),
    (4096, 128, 8), (4096, 256, 16),
])
def test_sums_go_in_terms_that_divide_and_partial_sums_stay_small(rows, columns, terms):
  assert ref._terms(rows, columns) == terms


@pytest.mark.parametrize('tokens', (1, 8, 70, 300))
def test_bfloat16_keeps_its_dtype_and_sums_in_float32(tokens):
  x, experts, chosen = problem(cases.Case('', tokens, 6, 32, 16, 0.3), dtype=jnp.bfloat16)
  got = jax.jit(lambda x, w, c: api.neuron_select(x, w, c, jax.nn.relu))(x, experts, chosen)
  assert got.dtype == jnp.bfloat16
  want = by_loops(x, experts, chosen, jax.nn.relu)
  assert np.abs(np.asarray(got, np.float32) - want).max() < 0.01 * np.abs(want).max()


@pytest.mark.parametrize('gated', (False, True))
def test_gradients_are_those_of_the_dense_products(gated):
  x, experts, chosen = problem(cases.Case('', 21, 5, 12, 6, 0.4), gated, biased=True)
  act = ACTS['silu'] if gated else jax.nn.silu
  aim = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

  def loss(run):
    return lambda x, w: jnp.sum((run(x, w, chosen, act) - aim) ** 2)

  got = jax.jit(jax.grad(loss(vjp.neuron_select), (0, 1)))(x, experts)
  want = jax.jit(jax.grad(loss(ref.everything), (0, 1)))(x, experts)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)


def test_no_token_and_wrong_shapes():
  x, experts, chosen = problem(cases.Case('', 4, 3, 8, 4, 0.5))
  assert api.neuron_select(x[:0], experts, chosen[:0], jax.nn.relu).shape == (0, 8)
  with pytest.raises(ValueError, match='do not fit'):
    api.neuron_select(x, experts, chosen[:, :2], jax.nn.relu)


def test_cost():
  assert api.cost(2, 8, 4, 3, 6, gated=True, itemsize=4) == (4 * (3 * 3 * 32 + 32), 2 * 3 * 6 * 32)


@pytest.mark.long(but=(
    'relu-False-False-one_token', 'relu-False-False-nothing_chosen', 'silu-True-True-few_tokens',
    'silu-True-True-an_idle_token', 'silu-True-True-tails', 'relu-False-False-all_on_one',
))
@pytest.mark.parametrize('case', cases.CHECKED, ids=lambda c: c.name)
@pytest.mark.parametrize('act, gated, biased', [('relu', False, False), ('silu', True, True)])
def test_the_tpu_kernel_is_the_loop(case, act, gated, biased):
  x, experts, chosen = problem(case, gated, biased)
  refused = tpu.supports(case.m, case.d, case.f, case.e, x.dtype, gated=gated)
  if case.m > tpu.MOST_ROWS:
    assert f'{case.m} tokens' in refused
    return
  assert refused == ''
  got = tpu.neuron_select(x, experts, jnp.asarray(chosen), ACTS[act], interpret=True)
  np.testing.assert_allclose(got, by_loops(x, experts, chosen, ACTS[act]), atol=2e-5)


@pytest.mark.parametrize('f', (256, 300), ids=('in_whole_pieces', 'with_a_tail'))
def test_the_tpu_kernel_takes_an_expert_in_pieces(f, monkeypatch):
  """What lies past the weights' end is NaN in interpret mode, as anything may be on a chip."""
  monkeypatch.setattr(tpu, 'STEP_BYTES', 1)
  x, experts, chosen = problem(cases.Case('', 5, 7, 24, f, 0.3), gated=True, biased=True)
  assert tpu.width(24, f, 3, 4) == 128
  got = tpu.neuron_select(x, experts, jnp.asarray(chosen), ACTS['silu'], interpret=True)
  np.testing.assert_allclose(got, by_loops(x, experts, chosen, ACTS['silu']), atol=4e-5)


def test_the_tpu_kernel_keeps_bfloat16_and_takes_float32_weights():
  x, experts, chosen = problem(cases.Case('', 3, 5, 32, 16, 0.4), dtype=jnp.bfloat16)
  want = by_loops(x, experts, chosen, jax.nn.relu)
  for held in (jnp.bfloat16, np.float32):
    own = {name: w.astype(held) for name, w in experts.items()}
    got = tpu.neuron_select(x, own, jnp.asarray(chosen), jax.nn.relu, interpret=True)
    assert got.dtype == jnp.bfloat16
    assert np.abs(np.asarray(got, np.float32) - want).max() < 0.01 * np.abs(want).max()


def test_an_idle_tokens_rows_do_not_reach_the_others():
  """Nor do experts that nobody chose, whatever is in them."""
  x, experts, chosen = problem(cases.Case('', 6, 5, 32, 16, 0.4), biased=True)
  chosen[2], chosen[:, 3] = False, False
  want = by_loops(x, experts, chosen, jax.nn.relu)
  x[2] = np.nan
  experts = {name: np.where(np.arange(5).reshape(-1, *[1] * (w.ndim - 1)) == 3, np.nan, w)
             for name, w in experts.items()}
  got = tpu.neuron_select(x, experts, jnp.asarray(chosen), jax.nn.relu, interpret=True)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_the_kernel_says_what_it_does_not_take():
  says = lambda *a, gated=False, **k: tpu.supports(*a, gated=gated, **k)
  assert says(1, 24, 40, 2, jnp.float32) == ''
  assert 'x is float16' in says(1, 24, 40, 2, jnp.float16)
  assert 'wi is int8' in says(1, 24, 40, 2, jnp.float32, weight_dtype=jnp.int8)
  assert 'm = 0' in says(0, 24, 40, 2, jnp.float32)
  assert 'vector memory' in says(256, 16384, 4096, 8, jnp.float32, gated=True)


def test_only_a_tpu_gets_the_kernel_and_only_for_few_tokens():
  for tokens, kernel in ((4, True), (300, False)):
    x, experts, chosen = problem(cases.Case('', tokens, 6, 32, 16, 0.3))
    run = jax.jit(lambda x, w, c: api.neuron_select(x, w, c, jax.nn.relu))
    traced = run.trace(x, experts, chosen)
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ('tpu', 'cuda', 'cpu')}
    assert {p: 'tpu_custom_call' in text for p, text in texts.items()} == {
        'tpu': kernel, 'cuda': False, 'cpu': False,
    }
