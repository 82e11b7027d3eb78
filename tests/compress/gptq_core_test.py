"""Grids, Hessians and GPTQ against the arrays of QMoE's published code, and GPTQ's inequality."""

import gc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.compress import gptq_core, grids_core, groups_core, hessian_core
from moejax.errors import UserError

VECTORS = Path(__file__).parents[1] / 'vectors' / 'qmoe'
BITS = {'1p5': 'ternary', '2': 2, '3': 3, '4': 4}


def swap(a):
  """Outputs x inputs of the vectors to our inputs x outputs, and back."""
  return jnp.swapaxes(jnp.asarray(a), -1, -2)


@pytest.fixture(scope='module')
def small():
  return np.load(VECTORS / 'gptq_small.npz')


@pytest.mark.parametrize('name', BITS)
@pytest.mark.parametrize('mode', ['asym', 'sym'])
@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit], ids=['eager', 'jit'])
def test_grid_is_exact(name, mode, wrap):
  data = np.load(VECTORS / 'quantizer.npz')
  x = swap(data['x'])

  def run(x):
    grid = grids_core.find_grid(x, BITS[name], symmetric=mode == 'sym')
    return grids_core.row_levels(grid), grid.values(grid.symbols(x))

  levels, values = wrap(run)(x)
  levels = levels[::-1] if name == '1p5' else levels
  np.testing.assert_array_equal(swap(levels[0]), data[f'scale_{name}_{mode}'])
  np.testing.assert_array_equal(swap(levels[1]), data[f'zero_{name}_{mode}'])
  np.testing.assert_array_equal(swap(values), data[f'deq_{name}_{mode}'])


def test_grid_scale_shrinks_and_threshold_moves_zeros():
  x = jax.random.normal(jax.random.key(0), (2, 64, 8))
  plain = grids_core.find_grid(x, 'ternary')
  scaled = grids_core.find_grid(x, 'ternary', grid_scale=jnp.array([1.0, 0.5]), threshold=0.7)
  np.testing.assert_allclose(scaled.high[0], plain.high[0])
  np.testing.assert_allclose(scaled.high[1], 0.5 * plain.high[1])
  zeros = lambda grid: np.mean(np.asarray(grid.symbols(x)) == 0, axis=(1, 2))
  assert zeros(scaled)[0] > zeros(plain)[0]
  assert zeros(scaled)[1] < zeros(plain)[1]


def test_unknown_bits_raise():
  with pytest.raises(UserError, match='bits = 5'):
    grids_core.find_grid(jnp.ones((1, 4, 4)), 5)


def test_hessian(small):
  for i in range(4):
    h = hessian_core.hessian(jnp.asarray(small[f'X{i}']))
    np.testing.assert_allclose(h, small['H'][i], rtol=1e-5, atol=1e-5 * small['H'][i].max())


def test_hessian_from_chunks(small):
  x = jnp.asarray(small['X0'])
  gram = sum(hessian_core.gram(chunk) for chunk in jnp.split(x, 4))
  streamed = hessian_core.scale_gram(gram[None], jnp.array([x.shape[0]]))[0]
  np.testing.assert_allclose(streamed, small['H'][0], rtol=1e-5, atol=1e-5 * small['H'][0].max())
  empty = hessian_core.scale_gram(jnp.zeros((1, 3, 3)), jnp.array([0]))[0]
  np.testing.assert_array_equal(empty, np.eye(3))


CASES = {
    'default': {}, 'block8': {'block_size': 8}, 'damp001': {'damping': 0.01},
    'actorder': {'act_order': True}, 'actorder_block16': {'act_order': True, 'block_size': 16},
}


@pytest.mark.parametrize('name', ['1p5', '2'])
@pytest.mark.parametrize('case', CASES)
def test_gptq_symbols_equal_the_reference(small, name, case):
  out = gptq_core.gptq(swap(small['W']), jnp.asarray(small['H']), BITS[name], **CASES[case])
  np.testing.assert_allclose(swap(out.values), small[f'Q_{name}_{case}'], atol=1e-6, rtol=0)
  assert not out.fallback.any()


@pytest.mark.parametrize('name', ['1p5', '2'])
@pytest.mark.parametrize('case,block', [('group16', 128), ('group16_block8', 8)])
def test_grouped_symbols_equal_the_reference(small, name, case, block):
  out = groups_core.gptq_grouped(
      swap(small['W']), jnp.asarray(small['H']), BITS[name], 16, block_size=block
  )
  np.testing.assert_allclose(swap(out.values), small[f'Q_{name}_{case}'], atol=1e-6, rtol=0)
  levels = grids_core.row_levels(out.grid)[0]
  assert levels.shape == (4, 3, 24)


@pytest.mark.parametrize('name', ['1p5', '2'])
def test_rtn_equals_the_reference(small, name):
  out = gptq_core.rtn(swap(small['W']), BITS[name])
  np.testing.assert_allclose(swap(out.values), small[f'Q_{name}_rtn'], atol=1e-6, rtol=0)


def test_jit_gives_the_same_symbols(small):
  w, h = swap(small['W']), jnp.asarray(small['H'])
  eager = gptq_core.gptq(w, h, 'ternary', block_size=16)
  jitted = jax.jit(lambda w, h: gptq_core.gptq(w, h, 'ternary', block_size=16))(w, h)
  np.testing.assert_array_equal(eager.symbols, jitted.symbols)


@pytest.mark.parametrize('name', ['1p5', '2'])
def test_three_blocks_in_bfloat16(name):
  data = np.load(VECTORS / 'gptq_medium.npz')
  w = swap(data['W_bf16_as_f32']).astype(jnp.bfloat16)
  out = gptq_core.gptq(w, jnp.asarray(data['H']), BITS[name])
  stored = swap(out.values).astype(jnp.bfloat16).astype(jnp.float32)
  np.testing.assert_array_equal(stored, data[f'Q_{name}'])


@pytest.mark.parametrize('name', ['1p5', '2'])
def test_only_the_bad_expert_falls_back(name):
  data = np.load(VECTORS / 'gptq_singular.npz')
  w, h = swap(data['W']), jnp.asarray(data['H'])
  out = gptq_core.gptq(w, h, BITS[name])
  np.testing.assert_allclose(swap(out.values), data[f'Q_{name}'], atol=1e-6, rtol=0)
  assert out.fallback.tolist() == [False, True, False, False]
  if name == '1p5':
    np.testing.assert_allclose(swap(out.values)[1:3], data['rtn_1p5'][1:3], atol=1e-6)


@pytest.mark.parametrize('poison', [np.nan, np.inf])
def test_a_hessian_that_is_not_finite_falls_back_alone(small, poison):
  w, h = swap(small['W']), jnp.asarray(small['H']).at[1, 3, 5].set(poison)
  out = gptq_core.gptq(w, h, 'ternary')
  assert out.fallback.tolist() == [False, True, False, False]
  np.testing.assert_array_equal(out.symbols[1], gptq_core.rtn(w, 'ternary').symbols[1])
  clean = gptq_core.gptq(w, jnp.asarray(small['H']), 'ternary')
  np.testing.assert_array_equal(out.symbols[0], clean.symbols[0])


@pytest.mark.parametrize('bits', ['ternary', 2, 3, 4, 8])
def test_gptq_trades_weight_error_for_output_error(bits):
  keys = jax.random.split(jax.random.key(1), 3)
  w = jax.random.normal(keys[0], (2, 80, 24))
  x = jax.random.normal(keys[1], (2, 400, 80)) @ jax.random.normal(keys[2], (2, 80, 80))
  h = jax.vmap(hessian_core.hessian)(x)
  ours, rounded = gptq_core.gptq(w, h, bits, block_size=32), gptq_core.rtn(w, bits)
  weight_error = lambda q: float(jnp.sum((w - q.values) ** 2))
  output_error = lambda q: float(jnp.sum(hessian_core.quadratic(h, w - q.values)))
  assert weight_error(ours) > weight_error(rounded)
  assert output_error(ours) < 0.8 * output_error(rounded)
  if bits == 8:
    assert weight_error(rounded) < 1e-4 * float(jnp.sum(w**2)) and ours.symbols.max() == 255


def test_damped_error_is_the_quadratic_form(small):
  w, h = swap(small['W']), jnp.asarray(small['H'])
  out = gptq_core.gptq(w, h, 'ternary', block_size=16)
  damped = h + out.damping[:, None, None] * jnp.eye(48)[None]
  want = hessian_core.quadratic(damped, w - out.values)
  np.testing.assert_allclose(out.damped_error, want, rtol=1e-3)


def test_block_and_width_do_not_matter():
  keys = jax.random.split(jax.random.key(2), 2)
  w = jax.random.normal(keys[0], (1, 67, 5))
  h = jax.vmap(hessian_core.hessian)(jax.random.normal(keys[1], (1, 200, 67)))
  wanted = gptq_core.gptq(w, h, 2, block_size=67).symbols
  for block in (1, 16, 24, 128):
    np.testing.assert_array_equal(gptq_core.gptq(w, h, 2, block_size=block).symbols, wanted)


@pytest.mark.parametrize('w, h', [
    ((2, 8, 4), (1, 8, 8)), ((2, 8, 4), (2, 7, 7)), ((2, 8, 4), (3, 8, 8)), ((8, 4), (8, 8)),
])
def test_shapes_that_do_not_fit_are_named(w, h):
  with pytest.raises(UserError, match=r'\[e, d, f\] and \[e, d, d\]'):
    gptq_core.gptq(jnp.ones(w), jnp.ones(h), 'ternary')


def test_nothing_outlives_a_sweep():
  """Weights and factors are freed at once, not when Python next looks for cycles."""
  w, h = jnp.ones((2, 24, 8)), jnp.broadcast_to(jnp.eye(24), (2, 24, 24))
  gptq_core.gptq(w, h, 'ternary', block_size=8)
  gc.collect()
  gc.disable()
  try:
    before = len(jax.live_arrays())
    gptq_core.gptq(w, h, 'ternary', block_size=8)
    assert len(jax.live_arrays()) == before
  finally:
    gc.enable()
