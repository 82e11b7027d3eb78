"""The product from packed symbols against float64 on every case, by every implementation."""

import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.packed_matmul import api, cases, cpu, gpu, layout, ref, tpu

PRODUCTS = {
    'ref': ref.packed_matmul, 'cpu': cpu.packed_matmul, 'gpu': gpu.packed_matmul,
    'tpu': functools.partial(tpu.packed_matmul, interpret=True),
}
CASES = pytest.mark.parametrize('case', cases.CHECKED, ids=lambda c: c.name)


def operands(case, dtype=np.float32):
  """x, words, scale, zero, sizes and dense weights; rows outside all groups are NaN."""
  rng = np.random.default_rng(len(case.name))
  e, groups = len(case.sizes), layout.groups(case.d, case.group_size)
  symbols = rng.integers(0, 1 << case.bits, (e, case.d, case.f))
  scale = rng.uniform(0.5, 1.5, (e, case.f, groups)).astype(np.float32)
  zero = rng.integers(0, 1 << case.bits, (e, case.f, groups)).astype(np.float32)
  of_input = lambda a: np.swapaxes(a, 1, 2)[:, np.arange(case.d) // (case.group_size or case.d)]
  dense = of_input(scale).astype(np.float64) * (symbols - of_input(zero))
  rows = sum(case.sizes) + case.outside
  x = jnp.asarray(rng.normal(size=(rows, case.d)), dtype).at[sum(case.sizes):].set(jnp.nan)
  words = layout.pack(symbols, case.bits)
  return x, words, scale, zero, jnp.array(case.sizes, jnp.int32), dense


def product64(case, x, dense):
  y, end = np.zeros((x.shape[0], case.f)), 0
  for size, w in zip(case.sizes, dense):
    y[end : end + size] = np.float64(x[end : end + size]) @ w
    end += size
  return y


def refused(case, dtype=jnp.float32):
  return tpu.supports(
      sum(case.sizes) + case.outside, case.d, case.f, len(case.sizes), dtype, case.bits,
      case.group_size,
  )


@pytest.mark.long(but=(
    *(f'float32-tpu-{name}' for name in (
        'empty_groups', 'tails', 'rounds_of_eight', 'three_bits_of_128', 'groups_of_32',
        'groups_of_100',
    )),
    *(f'float32-ref-{name}' for name in ('one_weight', 'odd_eight')),
    *(f'{dtype}-cpu-{case.name}' for dtype in ('float32', 'bfloat16') for case in cases.CHECKED),
    'float32-gpu-empty_groups', 'bfloat16-ref-groups_of_128', 'bfloat16-gpu-three_bits_of_128',
    'bfloat16-tpu-tails', 'bfloat16-tpu-groups_of_32',
))
@CASES
@pytest.mark.parametrize('name', PRODUCTS)
@pytest.mark.parametrize('dtype', (jnp.float32, jnp.bfloat16), ids=lambda d: jnp.dtype(d).name)
def test_product(name, case, dtype):
  if name == 'tpu' and case.name == 'groups_of_100':
    assert 'groups of 100 inputs neither divide 256' in refused(case, dtype)
    return
  *given, dense = operands(case, dtype)
  assert name != 'tpu' or refused(case, dtype) == ''
  run = functools.partial(PRODUCTS[name], bits=case.bits, group_size=case.group_size)
  y = (run if name == 'tpu' else jax.jit(run))(*given)
  assert y.dtype == dtype and y.shape == (given[0].shape[0], case.f)
  expected = product64(case, given[0], dense)
  # A weight rounds to bfloat16 on the other paths.
  step = 2.0**-7 if dtype == jnp.bfloat16 else 2e-6
  np.testing.assert_allclose(
      np.float64(y), expected, rtol=0, atol=step * max(1.0, np.abs(expected).max())
  )


def test_the_kernel_says_what_it_does_not_take():
  assert tpu.supports(1, 24, 40, 2, jnp.float32, 3) == ''
  assert 'float16' in tpu.supports(1, 24, 40, 2, jnp.float16, 4)
  assert 'm = 0' in tpu.supports(0, 24, 40, 2, jnp.float32, 4)
  assert 'inside a register' in tpu.supports(1, 520, 40, 2, jnp.float32, 3, 128)
  assert 'vector memory' in tpu.supports(1, 1 << 16, 512, 2, jnp.float32, 8)


@pytest.mark.parametrize('d, bits, group_size', [
    (4096, 3, 0), (700, 3, 0), (333, 8, 0), (520, 4, 32), (1024, 3, 128),
])
def test_every_input_meets_its_weight_and_no_other(d, bits, group_size):
  for field in tpu.fields(d, bits, group_size):
    at = np.asarray(tpu.ordered(jnp.arange(1, d + 1)[None], field))[0]
    assert sorted(at[at > 0]) == list(range(1, d + 1))
    assert len(at) == field.inputs and field.begin % 8 == 0 and field.words % 8 == 0


def test_what_the_kernel_does_not_take_goes_by_xla():
  case = cases.Case('half', (5, 3), 0, 16, 24, 4)
  x, words, scale, zero, sizes, dense = operands(case, jnp.float16)
  y = api.packed_matmul(x, words, scale, zero, sizes, bits=4)
  assert y.dtype == jnp.float16
  expected = product64(case, x, dense)
  np.testing.assert_allclose(y, expected, atol=2e-3 * np.abs(expected).max())
  none = api.packed_matmul(x[:0], words, scale, zero, jnp.zeros(2, jnp.int32), bits=4)
  assert none.shape == (0, 24)


def test_shapes_that_do_not_fit_are_named():
  x, words, scale, zero, sizes, _ = operands(cases.CHECKED[1])
  with pytest.raises(ValueError, match=r'x \(1, 24\), 2-bit words \(2, 3, 40\)'):
    api.packed_matmul(x, words, scale, zero, sizes, bits=2)


HOPPER = (
    cases.Case('two_tiles', (5, 0, 3), 2, 192, 64, 4),
    cases.Case('two_bits', (1,), 0, 1152, 128, 2),
    cases.Case('three_bits', (40, 1, 30), 1, 768, 64, 3),
    cases.Case('eight_bits', (0, 70, 0), 0, 576, 64, 8), cases.Case('no_row', (0, 0), 3, 64, 64, 4),
)


@pytest.mark.parametrize('case', HOPPER, ids=lambda c: c.name)
def test_the_hopper_kernel_lowers(case):
  *given, _ = operands(case, jnp.bfloat16)
  product = functools.partial(gpu.mosaic_packed_matmul, bits=case.bits)
  lowered = jax.jit(product).trace(*given).lower(lowering_platforms=('cuda',)).as_text()
  assert lowered.count('mosaic_gpu') >= len(layout.FIELDS[case.bits])


if jax.__version_info__ >= (0, 12):  # Before, JAX interprets no Mosaic GPU.

  def test_the_hopper_kernel_multiplies_right():
    """Every case in one test, so that all run where of each test only the first does."""
    for case in HOPPER:
      *given, dense = operands(case, jnp.bfloat16)
      got = gpu.mosaic_packed_matmul(
          *given, bits=case.bits, interpret=plgpu.InterpretGPUParams()
      )
      want = product64(case, given[0], dense)
      assert got.dtype == jnp.bfloat16
      np.testing.assert_allclose(
          np.float64(got), want, rtol=2**-8, atol=1e-5 * np.abs(want).max(initial=1.0),
          err_msg=case.name,
      )


def test_a_gpu_gets_the_hopper_kernel_where_it_is_asked_for(monkeypatch):
  *given, _ = operands(HOPPER[0], jnp.bfloat16)
  lowered = lambda *given: jax.jit(lambda *a: api.packed_matmul(*a, bits=4)).trace(
      *given
  ).lower(lowering_platforms=('cuda',)).as_text()
  assert 'mosaic_gpu' not in lowered(*given)
  monkeypatch.setenv('MOEJAX_GPU', 'mosaic')
  assert 'mosaic_gpu' in lowered(*given)
  assert 'groups of 128' in gpu.supports(8, 256, 64, 1, jnp.bfloat16, 3, 128)
  assert 'multiples of 256' in gpu.supports(8, 128, 64, 1, jnp.bfloat16, 3, 0)
  with pytest.raises(ValueError, match='mosaic_packed_matmul: x is float32'):
    gpu.mosaic_packed_matmul(given[0].astype(jnp.float32), *given[1:], bits=4)


def test_only_a_tpu_gets_the_kernel():
  *given, _ = operands(cases.CHECKED[1])
  traced = jax.jit(functools.partial(api.packed_matmul, bits=3)).trace(*given)
  texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ('tpu', 'cuda', 'cpu')}
  assert {p: 'tpu_custom_call' in text for p, text in texts.items()} == {
      'tpu': True, 'cuda': False, 'cpu': False,
  }


def test_the_cost_counts_each_expert_with_rows_once():
  few, many = (api.cost(4, 4096, 512, active, 4, 2) for active in (1, 3))
  assert few.flops == many.flops == 2 * 4 * 4096 * 512
  assert many.bytes_moved - few.bytes_moved == 2 * (4096 * 512 / 2 + 4 * 512)
