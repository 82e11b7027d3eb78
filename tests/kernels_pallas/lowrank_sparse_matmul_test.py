"""Low rank plus kept outputs against float64 on every case, by every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.lowrank_sparse_matmul import api, cases, gpu, ref, tpu

PATHS = {
    'ref': (jax.jit(ref.lowrank_sparse_matmul), jax.jit(ref.expand)),
    'gpu': (jax.jit(gpu.lowrank_sparse_matmul), jax.jit(gpu.expand)),
    'tpu': tuple(
        functools.partial(f, interpret=True) for f in (tpu.lowrank_sparse_matmul, tpu.expand)
    ),
}
CASES = pytest.mark.parametrize('case', cases.CHECKED, ids=lambda c: c.name)


def operands(case, dtype=np.float32):
  """x, left, right, kept, index, sizes; rows outside all groups are NaN, and unused columns 9."""
  rng = np.random.default_rng(len(case.name))
  e, index = len(case.sizes), case.outputs()
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  rows = sum(case.sizes) + case.outside
  kept = np.where((index < case.f)[:, None], rng.normal(size=(e, case.d, index.shape[1])), 9.0)
  return (
      draw(rows, case.d).at[sum(case.sizes):].set(jnp.nan), draw(e, case.d, case.r),
      draw(e, case.r, case.f), jnp.asarray(kept, dtype), jnp.asarray(index),
      jnp.array(case.sizes, jnp.int32),
  )


def product64(x, left, right, kept, index, sizes):
  x, left, right, kept = (np.float64(a) for a in (x, left, right, kept))
  y, end = np.zeros((len(x), right.shape[2])), 0
  for e, size in enumerate(sizes):
    dense = left[e] @ right[e]
    own = np.asarray(index[e]) < dense.shape[1]
    dense[:, np.asarray(index[e])[own]] += kept[e][:, own]
    y[end : end + size] = x[end : end + size] @ dense
    end += size
  return y


@pytest.mark.long(but=(
    *(f'float32-tpu-{name}' for name in ('one_row', 'empty_groups', 'tails', 'nothing_kept')),
    'float32-ref-empty_groups', 'float32-gpu-empty_groups', 'bfloat16-ref-tails',
    'bfloat16-tpu-tails',
))
@CASES
@pytest.mark.parametrize('name', PATHS)
@pytest.mark.parametrize('dtype', (jnp.float32, jnp.bfloat16), ids=lambda d: jnp.dtype(d).name)
def test_product(name, case, dtype):
  given = operands(case, dtype)
  y = PATHS[name][0](*given)
  assert y.dtype == dtype and y.shape == (len(given[0]), case.f)
  expected = product64(*given)
  step = 2.0**-7 if dtype == jnp.bfloat16 else 3e-6
  np.testing.assert_allclose(
      np.float64(y), expected, rtol=0, atol=step * max(1.0, np.abs(expected).max())
  )


@pytest.mark.long(but=('ref-empty_groups', 'gpu-empty_groups', 'tpu-empty_groups', 'tpu-tails'))
@CASES
@pytest.mark.parametrize('name', PATHS)
def test_expand_takes_what_was_projected(name, case):
  x, left, right, kept, index, sizes = operands(case)
  project = lambda w: jnp.asarray(product64(
      x, w, np.broadcast_to(np.eye(w.shape[2]), (len(sizes), w.shape[2], w.shape[2])),
      np.zeros((len(sizes), case.d, 1)), np.full((len(sizes), 1), w.shape[2]), sizes,
  ), jnp.float32)
  y = PATHS[name][1](project(left), project(kept), right, index, sizes)
  expected = product64(x, left, right, kept, index, sizes)
  np.testing.assert_allclose(y, expected, rtol=0, atol=3e-6 * max(1.0, np.abs(expected).max()))


def test_weights_may_be_of_another_dtype_than_the_rows():
  x, *weights, index, sizes = operands(cases.CHECKED[3])
  weights = [w.astype(jnp.bfloat16) for w in weights]
  expected = product64(x, *weights, index, sizes)
  for name, (product, _) in PATHS.items():
    y = product(x, *weights, index, sizes)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max(), err_msg=name)


def test_what_the_kernels_do_not_take_goes_by_xla():
  assert tpu.supports(1, 24, 40, 3, 7, 2, jnp.float32) == ''
  assert 'float16' in tpu.supports(1, 24, 40, 3, 7, 2, jnp.float16)
  assert 'weights are int8' in tpu.supports(1, 24, 40, 3, 7, 2, jnp.float32, jnp.int8)
  assert tpu.supports(1, 24, 1, 3, 7, 2, jnp.bfloat16) == 'one output'
  assert 'r = 0' in tpu.supports(1, 24, 40, 0, 7, 2, jnp.float32)
  assert 'vector memory' in tpu.supports(512, 4096, 1 << 15, 1 << 14, 7, 2, jnp.float32)
  x, left, right, kept, index, sizes = operands(cases.CHECKED[1])
  y = api.lowrank_sparse_matmul(x, left[..., :0], right[:, :0], kept, index, sizes)
  expected = product64(x, left[..., :0], right[:, :0], kept, index, sizes)
  np.testing.assert_allclose(y, expected, atol=1e-5)
  none = api.lowrank_sparse_matmul(x[:0], left, right, kept, index, jnp.zeros(2, jnp.int32))
  assert none.shape == (0, 40)


def test_shapes_that_do_not_fit_are_named():
  x, left, right, kept, index, sizes = operands(cases.CHECKED[1])
  with pytest.raises(ValueError, match=r'x \(1, 23\), left \(2, 24, 3\)'):
    api.lowrank_sparse_matmul(x[:, :23], left, right, kept, index, sizes)


def test_only_a_tpu_gets_the_kernels():
  for function, given in (
      (api.lowrank_sparse_matmul, operands(cases.CHECKED[1])),
      (api.expand, (jnp.ones((1, 3)), jnp.ones((1, 7)), *operands(cases.CHECKED[1])[2:3],
                    *operands(cases.CHECKED[1])[4:])),
  ):
    traced = jax.jit(function).trace(*given)
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ('tpu', 'cuda', 'cpu')}
    assert {p: 'tpu_custom_call' in text for p, text in texts.items()} == {
        'tpu': True, 'cuda': False, 'cpu': False,
    }


@pytest.mark.parametrize('d, columns, itemsize, deep', [
    (1, 256, 2, 1), (4096, 1280, 2, 1024), (700, 1 << 14, 4, 128), (6400, 1280, 2, 1280),
])
def test_tiles_of_inputs_divide_them_where_they_can(d, columns, itemsize, deep):
  assert tpu.depth(d, columns, itemsize) == deep


def test_the_cost_counts_each_expert_with_rows_once():
  few, many = (api.cost(4, 64, 32, 8, 5, active, 2) for active in (1, 3))
  assert few.flops == many.flops == 2 * 4 * (8 * 96 + 5 * 64)
  assert many.bytes_moved - few.bytes_moved == 2 * (2 * (8 * 96 + 5 * 64) + 4 * 5)
