"""The product from two-bit words against float64 on every case, by every implementation."""

import functools
import itertools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import hopper
from kernels_pallas.ternary_matmul import api, cases, cpu, gpu, layout, ref, tpu

PRODUCTS = {
    'ref': jax.jit(ref.ternary_matmul), 'cpu': jax.jit(cpu.ternary_matmul),
    'gpu': jax.jit(gpu.ternary_matmul),
    'tpu': functools.partial(tpu.ternary_matmul, interpret=True),
}
CASES = pytest.mark.parametrize('case', cases.CHECKED, ids=lambda c: c.name)


def operands(case, dtype=np.float32):
  """Rows outside all groups are NaN; one output has no high weight, one no weight."""
  rng = np.random.default_rng(len(case.name))
  e, z = len(case.sizes), case.zero_share
  signs = rng.choice([-1, 0, 1], p=[(1 - z) / 2, z, (1 - z) / 2], size=(e, case.d, case.f))
  if case.f > 3:
    signs[:, :, 1] = -np.abs(signs[:, :, 1])
    signs[:, :, 2] = 0
  levels = np.sort(rng.normal(size=(e, 2, case.f)), axis=1).astype(np.float32)
  rows = sum(case.sizes) + case.outside
  x = jnp.asarray(rng.normal(size=(rows, case.d)), dtype).at[sum(case.sizes):].set(jnp.nan)
  return x, signs.astype(np.int8), levels, jnp.array(case.sizes, jnp.int32)


def product64(case, x, signs, levels):
  dense = np.where(signs > 0, levels[:, 1:], np.where(signs < 0, levels[:, :1], 0.0))
  y, end = np.zeros((x.shape[0], case.f)), 0
  for size, w in zip(case.sizes, np.float64(dense)):
    y[end : end + size] = np.float64(x[end : end + size]) @ w
    end += size
  return y


@pytest.mark.long(but=(
    *(f'float32-{name}-{case}' for name in ('ref', 'tpu') for case in (
        'one_weight', 'empty_groups', 'tails', 'many_inputs',
    )),
    *(f'{dtype}-cpu-{case.name}' for dtype in ('float32', 'bfloat16') for case in cases.CHECKED),
    'float32-gpu-tails', 'bfloat16-ref-tails', 'bfloat16-gpu-all_zero', 'bfloat16-tpu-tails',
    'bfloat16-tpu-empty_groups',
))
@CASES
@pytest.mark.parametrize('name', PRODUCTS)
@pytest.mark.parametrize('dtype', (jnp.float32, jnp.bfloat16), ids=lambda d: jnp.dtype(d).name)
def test_product(name, case, dtype):
  x, signs, levels, sizes = operands(case, dtype)
  if dtype == jnp.bfloat16:  # So that the reference path's weights are the kernel's.
    levels = np.asarray(jnp.asarray(levels, jnp.bfloat16), np.float32)
  y = PRODUCTS[name](x, layout.pack(signs), levels, sizes)
  assert y.dtype == dtype and y.shape == (x.shape[0], case.f)
  expected = product64(case, x, signs, levels)
  step = 2.0**-8 if dtype == jnp.bfloat16 else 1e-6
  np.testing.assert_allclose(
      np.float64(y), expected, rtol=0, atol=step * max(1.0, np.abs(expected).max())
  )


@pytest.mark.long(but=(
    'ref-tails', *(f'cpu-{case.name}' for case in cases.CHECKED), 'gpu-dense', 'tpu-one_weight',
    'tpu-tails', 'tpu-many_inputs',
))
@CASES
@pytest.mark.parametrize('name', PRODUCTS)
def test_one_level_is_two_of_its_size(name, case):
  x, signs, levels, sizes = operands(case)
  levels[:, 0] = -levels[:, 1]
  y = PRODUCTS[name](x, layout.pack(signs), levels[:, 1:], sizes)
  expected = product64(case, x, signs, levels)
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize('d', (1, 31, 256, 257, 700))
@pytest.mark.parametrize('xp', (np, jnp))
def test_words_hold_every_weight(d, xp):
  signs = np.random.default_rng(d).integers(-1, 2, (2, d, 5)).astype(np.int8)
  words = layout.pack(xp.asarray(signs), xp)
  assert words.shape == (2, layout.words_of(d), 5) and words.dtype == np.uint32
  np.testing.assert_array_equal(layout.unpack(words, d, xp), signs)
  for one, words_wf in zip(signs, words):
    halves = layout.halves(jnp.asarray(words_wf))
    np.testing.assert_array_equal(np.float32(halves[:d]), layout.UNIT * one)
    assert not np.float32(halves[d:]).any()


def test_the_kernel_says_what_it_does_not_take():
  assert tpu.supports(1, 24, 40, 2, jnp.float32) == ''
  assert 'float16' in tpu.supports(1, 24, 40, 2, jnp.float16)
  assert 'm = 0' in tpu.supports(0, 24, 40, 2, jnp.float32)


def test_what_the_kernel_does_not_take_goes_by_xla():
  case = cases.Case('half', (5, 3), 0, 16, 24)
  x, signs, levels, sizes = operands(case, jnp.float16)
  y = api.ternary_matmul(x, layout.pack(signs), levels, sizes)
  assert y.dtype == jnp.float16
  np.testing.assert_allclose(y, product64(case, x, signs, levels), atol=2e-2)
  none = api.ternary_matmul(x[:0], layout.pack(signs), levels, jnp.zeros(2, jnp.int32))
  assert none.shape == (0, 24)


def test_shapes_that_do_not_fit_are_named():
  x, signs, levels, sizes = operands(cases.CHECKED[1])
  with pytest.raises(ValueError, match=r'x \(1, 23\), words \(2, 16, 40\)'):
    api.ternary_matmul(x[:, :23], layout.pack(signs)[:, :16], levels[:1], sizes)


HOPPER = (
    cases.Case('two_tiles', (5, 0, 3), 2, 200, 64), cases.Case('one_row', (1,), 0, 1024, 128),
    cases.Case('tails', (40, 1, 30), 1, 1300, 64), cases.Case('all_on_one', (0, 20, 0), 0, 24, 64),
    cases.Case('no_row', (0, 0), 3, 24, 64),
)


def packed(case, dtype=jnp.bfloat16, levels=2):
  x, signs, values, sizes = operands(case, dtype)
  values = np.asarray(jnp.asarray(values[:, -levels:], jnp.bfloat16), np.float32)
  return x, layout.pack(signs), values, sizes


@pytest.mark.parametrize('levels', (1, 2))
@pytest.mark.parametrize('case', HOPPER, ids=lambda c: c.name)
def test_the_hopper_kernel_lowers(case, levels):
  traced = jax.jit(lambda *a: gpu.mosaic_ternary_matmul(*a)).trace(*packed(case, levels=levels))
  assert 'mosaic_gpu' in traced.lower(lowering_platforms=('cuda',)).as_text()


if jax.__version_info__ >= (0, 12):  # Before, JAX interprets no Mosaic GPU.

  def test_the_hopper_kernel_multiplies_right():
    """Every case in one test, so that all run where of each test only the first does."""
    for case, levels in itertools.product(HOPPER, (1, 2)):
      x, words, values, sizes = packed(case, levels=levels)
      signs = operands(case)[1]
      both = values if levels == 2 else np.concatenate([-values, values], 1)
      got = gpu.mosaic_ternary_matmul(
          x, words, values, sizes, interpret=plgpu.InterpretGPUParams()
      )
      assert got.dtype == jnp.bfloat16
      np.testing.assert_allclose(
          np.float64(got), product64(case, x, signs, both), rtol=2**-8, atol=1e-5,
          err_msg=f'{case.name}, {levels}',
      )


def test_a_gpu_gets_the_hopper_kernel_where_it_is_asked_for(monkeypatch):
  lowered = lambda dtype=jnp.bfloat16: jax.jit(lambda *a: api.ternary_matmul(*a)).trace(
      *packed(HOPPER[0], dtype)
  ).lower(lowering_platforms=('cuda',)).as_text()
  assert 'mosaic_gpu' not in lowered()
  monkeypatch.setenv('MOEJAX_GPU', 'mosaic')
  assert 'mosaic_gpu' in lowered()
  assert 'mosaic_gpu' not in lowered(jnp.float32)
  assert 'outputs' in hopper.supports(8, 40, 1, jnp.bfloat16)
  assert '65 rows of 1' in hopper.supports(65, 64, 1, jnp.bfloat16)
  with pytest.raises(ValueError, match='mosaic_ternary_matmul: x is float32'):
    gpu.mosaic_ternary_matmul(*packed(HOPPER[0], jnp.float32))
  monkeypatch.setenv('MOEJAX_GPU', 'triton')
  with pytest.raises(ValueError, match='MOEJAX_GPU=triton is none of'):
    lowered()


def test_only_a_tpu_gets_the_kernel():
  x, signs, levels, sizes = operands(cases.CHECKED[1])
  traced = jax.jit(api.ternary_matmul).trace(x, layout.pack(signs), levels, sizes)
  texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ('tpu', 'cuda', 'cpu')}
  assert {p: 'tpu_custom_call' in text for p, text in texts.items()} == {
      'tpu': True, 'cuda': False, 'cpu': False,
  }


@pytest.mark.parametrize('d,chunks', [(1, 1), (2080, 9), (4096, 16), (6144, 12), (6400, 13)])
def test_tiles_leave_little_empty(d, chunks):
  assert tpu.depth(d) == chunks


def test_the_cost_counts_each_expert_with_rows_once():
  few, many = (api.cost(4, 4096, 512, active, 2, 2) for active in (1, 3))
  assert few.flops == many.flops == 2 * 4 * 4096 * 512
  assert many.bytes_moved - few.bytes_moved == 2 * (4096 * 512 / 4 + 4 * 512)
