"""The grouped products against float64 on every case, by every implementation that runs here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import extension
from kernels_pallas.grouped_matmul import api, cases, cpu, gpu, ref, tpu, vjp


def interpreted(function):
  return lambda *args, **kwargs: function(*args, **kwargs, interpret=True)


PRODUCTS = {
    'ref': ref.product, 'cpu': cpu.product, 'tpu': interpreted(tpu.product), 'gpu': gpu.product,
}
OUTERS = {'ref': ref.outer, 'cpu': cpu.outer, 'tpu': interpreted(tpu.outer), 'gpu': gpu.outer}
CASES = pytest.mark.parametrize('case', cases.CHECKED, ids=lambda c: c.name)


def operands(case, dtype=np.float32):
  rng = np.random.default_rng(len(case.name))
  rows = sum(case.sizes) + case.outside
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  x = normal(rows, case.d).at[sum(case.sizes):].set(jnp.nan)
  w = normal(len(case.sizes), case.d, case.f)
  return x, w, normal(rows, case.f), jnp.array(case.sizes, jnp.int32)


def by_group(case):
  ends = np.cumsum(case.sizes)
  return [slice(end - size, end) for end, size in zip(ends, case.sizes)]


def product64(case, x, w):
  y = np.zeros((x.shape[0], w.shape[2]))
  for rows, w_df in zip(by_group(case), np.float64(w)):
    y[rows] = np.float64(x)[rows] @ w_df
  return y


@pytest.mark.long(but=(
    'ref-one_row', 'ref-no_rows', 'ref-empty_groups', 'ref-all_on_one', 'ref-all_on_the_last',
    'ref-tails', 'ref-nearly_even', 'ref-whole_tiles', 'ref-every_block', 'cpu-one_row',
    'cpu-no_rows', 'cpu-empty_groups', 'cpu-all_on_one', 'cpu-all_on_the_last', 'cpu-tails',
    'cpu-nearly_even', 'cpu-whole_tiles', 'cpu-every_block', 'tpu-one_row',
    'tpu-no_rows', 'tpu-empty_groups', 'tpu-tails', 'gpu-empty_groups', 'gpu-tails',
))
@CASES
@pytest.mark.parametrize('name', PRODUCTS)
def test_product(name, case):
  x, w, dy, sizes = operands(case)
  y = PRODUCTS[name](jnp.nan_to_num(x), w, sizes)
  np.testing.assert_allclose(y, product64(case, np.nan_to_num(x), w), atol=2e-4)
  transposed = PRODUCTS[name](dy, w, sizes, transpose=True)
  np.testing.assert_allclose(
      transposed, product64(case, dy, np.swapaxes(w, 1, 2)), atol=2e-4
  )


@CASES
@pytest.mark.parametrize('name', OUTERS)
def test_outer(name, case):
  x, _, dy, sizes = operands(case)
  x = jnp.nan_to_num(x)
  dw = OUTERS[name](x, dy, sizes, jnp.float32)
  expected = [np.float64(x)[rows].T @ np.float64(dy)[rows] for rows in by_group(case)]
  np.testing.assert_allclose(dw, np.stack(expected), atol=5e-4)


@pytest.mark.parametrize('name', ('ref', 'cpu', 'tpu'))
def test_rows_that_belong_to_no_group_do_not_matter(name):
  case = next(c for c in cases.CHECKED if c.name == 'tails')
  x, w, dy, sizes = operands(case)
  assert np.isnan(x).any()
  assert np.isfinite(PRODUCTS[name](x, w, sizes)).all()
  assert np.isfinite(OUTERS[name](x, dy, sizes, jnp.float32)).all()


@pytest.mark.parametrize('name', PRODUCTS)
def test_bfloat16_is_summed_in_float32(name):
  case = cases.Case('deep', (40, 24), 0, 2048, 128)
  x, w, _, sizes = operands(case, jnp.bfloat16)
  y = PRODUCTS[name](x, w, sizes)
  assert y.dtype == jnp.bfloat16
  exact = product64(case, x, w)
  assert np.abs(np.float64(y) - exact).max() <= 2.0**-8 * np.abs(exact).max()


@pytest.mark.parametrize('d,f', ((33, 131), (64, 37), (300, 256)))
def test_every_height_of_a_tile_on_cpu(d, f):
  case = cases.Case('heights', (*range(1, 16), 27, 28, 29), 1, d, f)
  x, w, dy, sizes = operands(case)
  np.testing.assert_allclose(cpu.product(x, w, sizes), product64(case, x, w), atol=2e-4)
  x, w, dy = (a.astype(jnp.bfloat16) for a in (x, w, dy))
  y = cpu.product(x, w, sizes, dtype=jnp.float32)
  np.testing.assert_allclose(y, product64(case, x, w), atol=2e-4)
  dx = cpu.product(dy, w, sizes, transpose=True, dtype=jnp.float32)
  np.testing.assert_allclose(dx, product64(case, dy, np.swapaxes(w, 1, 2)), atol=2e-4)


def test_other_types_go_by_xla():
  assert 'float16 is neither' in extension.without(jnp.float32, jnp.float16)
  case = cases.Case('half', (5, 3), 1, 16, 24)
  x, w, _, sizes = operands(case, jnp.float16)
  y = api.product(jnp.nan_to_num(x), w, sizes)
  assert y.dtype == jnp.float16
  np.testing.assert_allclose(y, product64(case, np.nan_to_num(x), w), atol=2e-2)


def test_numbers_that_are_none_stay_none_in_bfloat16():
  x = jnp.array([[np.nan], [np.inf], [-np.inf], [3e38]], jnp.bfloat16)
  y = cpu.product(x, jnp.ones((1, 1, 1), jnp.bfloat16), jnp.array([4]))
  np.testing.assert_array_equal(np.float32(y), np.float32(x))


@pytest.mark.parametrize('m,d,f', ((3, 0, 40), (3, 8, 0), (0, 8, 40)))
def test_nothing_to_multiply(m, d, f):
  y = cpu.product(jnp.ones((m, d)), jnp.ones((2, d, f)), jnp.array([m, 0]))
  np.testing.assert_array_equal(y, jnp.zeros((m, f)))
  dw = cpu.outer(jnp.ones((m, d)), jnp.ones((m, f)), jnp.array([m, 0]), jnp.float32)
  np.testing.assert_array_equal(dw[0], jnp.full((d, f), m))


@pytest.mark.parametrize('x,w,sizes', [
    ((4, 64), (2, 32, 16), 2), ((4, 32), (2, 32, 16), 3), ((4, 16), (2, 32, 24), 2),
])
def test_shapes_that_do_not_fit(x, w, sizes):
  for transpose in (False, True):
    with pytest.raises(ValueError, match='do not fit'):
      api.product(jnp.ones(x), jnp.ones(w), jnp.ones(sizes, int), transpose=transpose)
  with pytest.raises(ValueError, match='do not fit'):
    api.outer(jnp.ones((8, 4)), jnp.ones((4, 4)), jnp.array([8]), jnp.float32)


def test_sizes_past_the_rows_are_cut():
  x, w = jnp.ones((3, 2)), jnp.ones((2, 2, 4))
  y = cpu.product(x, w, jnp.array([2, 9]))
  np.testing.assert_array_equal(y, jnp.full((3, 4), 2.0))


def test_float16_runs_where_the_kernel_knows_only_bfloat16_and_float32():
  case = cases.Case('half', (5, 3), 0, 16, 24)
  x, w, _, sizes = operands(case, jnp.float16)
  y = PRODUCTS['tpu'](x, w, sizes)
  assert y.dtype == jnp.float16
  np.testing.assert_allclose(y, product64(case, x, w), atol=2e-2)


@pytest.mark.parametrize('rows,piece', [
    (768, 256), (2080, 260), (6400, 256), (1408, 352), (131, 131), (521, 521), (24, 24), (509, 509),
])
def test_a_matrix_is_multiplied_in_pieces_that_divide_it(rows, piece):
  assert ref.piece_of(rows) == piece


@pytest.mark.parametrize('d', (521, 768, 2080))
def test_pieces_add_up_to_the_whole(d):
  case = cases.Case('pieces', (1, 0, 9, 40), 2, d, 24)
  x, w, dy, sizes = operands(case)
  y = ref.product(jnp.nan_to_num(x), w, sizes)
  np.testing.assert_allclose(y, product64(case, np.nan_to_num(x), w), atol=5e-4)
  dx = ref.product(dy, w, sizes, transpose=True)
  np.testing.assert_allclose(dx, product64(case, dy, np.swapaxes(w, 1, 2)), atol=2e-4)


@pytest.mark.parametrize('size,limit,expected', [
    (24, 1024, 24), (1024, 1024, 1024), (6400, 1024, 640), (2080, 1024, 512),
    (1600, 1024, 512), (3072, 512, 512),
])
def test_tiles_divide_an_axis_where_wide_ones_do(size, limit, expected):
  assert tpu.tile(size, limit) == expected


def test_row_tiles_follow_the_mean_share_of_a_group():
  assert [tpu.row_tile(m, 16) for m in (16, 4096, 8192, 65536)] == [128, 256, 512, 512]


def structs(case, dtype):
  rows, e = sum(case.sizes) + case.outside, len(case.sizes)
  return (
      jax.ShapeDtypeStruct((rows, case.d), dtype), jax.ShapeDtypeStruct((e, case.d, case.f), dtype),
      jax.ShapeDtypeStruct((e,), jnp.int32),
  )


def forward_and_gradients(x, w, sizes):
  y, pull = jax.vjp(lambda x, w: vjp.grouped_matmul(x, w, sizes), x, w)
  return y, pull(y)


def test_a_tpu_gets_mosaic_kernels_and_nothing_ragged():
  traced = jax.jit(forward_and_gradients).trace(*structs(cases.CHECKED[-1], jnp.bfloat16))
  text = traced.lower(lowering_platforms=('tpu',)).as_text()
  assert text.count('tpu_custom_call') == 3
  assert 'ragged' not in text


def test_the_hopper_kernel_lowers_and_names_what_it_cannot_take():
  case = cases.Case('hopper', (100, 0, 27), 3, 128, 256)
  traced = jax.jit(gpu.mosaic_product).trace(*structs(case, jnp.bfloat16))
  assert 'mosaic_gpu' in traced.lower(lowering_platforms=('cuda',)).as_text()
  with pytest.raises(ValueError, match='float32'):
    jax.eval_shape(gpu.mosaic_product, *structs(case, jnp.float32))
  with pytest.raises(ValueError, match='d = 24'):
    jax.eval_shape(gpu.mosaic_product, *structs(cases.CHECKED[2], jnp.bfloat16))


def test_a_gpu_gets_the_hopper_kernel_where_it_is_asked_for(monkeypatch):
  case = cases.Case('hopper', (7, 0, 3), 0, 128, 256)
  lowered = lambda case: jax.jit(lambda *a: api.product(*a)).trace(
      *structs(case, jnp.bfloat16)
  ).lower(lowering_platforms=('cuda',)).as_text()
  assert 'mosaic_gpu' not in lowered(case)
  monkeypatch.setenv('MOEJAX_GPU', 'mosaic')
  assert 'mosaic_gpu' in lowered(case)
  assert 'mosaic_gpu' not in lowered(cases.CHECKED[2])
  assert 'mosaic_gpu' not in lowered(cases.Case('no_rows', (0, 0), 0, 128, 256))


def test_the_cost_counts_tokens_not_groups():
  few, many = (api.cost(100, 64, 32, active, 2) for active in (1, 50))
  assert few.flops == many.flops == 2 * 100 * 64 * 32
  assert few.bytes_moved == 2 * (100 * 64 + 64 * 32 + 100 * 32)


def test_the_kernel_says_what_it_does_not_take_and_xla_takes_it():
  assert tpu.supports(1, 24, 40, 2) == ''
  assert 'm = 0' in tpu.supports(0, 24, 40, 2) and '0 experts' in tpu.supports(3, 24, 40, 0)
  lowered = lambda m: jax.jit(api.product).trace(
      jnp.ones((m, 24)), jnp.ones((2, 24, 40)), jnp.array([m, 0])
  ).lower(lowering_platforms=('tpu',)).as_text()
  assert 'tpu_custom_call' in lowered(3) and 'tpu_custom_call' not in lowered(0)
