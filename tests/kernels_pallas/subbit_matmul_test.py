"""The product from codes of blocks against float64 on every case, by every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import extension
from kernels_pallas.subbit_matmul import api, cases, cpu, gpu, layout, ref, tpu
from kernels_pallas.subbit_matmul.layout import deal, decode, encode
from kernels_pallas.ternary_matmul import layout as two_bit

PRODUCTS = {
    name: jax.jit(module.subbit_matmul, static_argnames='sizes')
    for name, module in (('ref', ref), ('gpu', gpu), ('cpu', cpu))
    if module is not cpu or not extension.missing()
}
CASES = pytest.mark.parametrize('case', cases.CHECKED, ids=lambda c: c.name)


@functools.cache
def coded(case):
  """Signs and codes."""
  signs = case.signs()
  return signs, encode.encode_stack(signs, case.block)


def kept(levels_enf, homes_etl):
  """Levels of outputs as those of the columns kept."""
  out = np.zeros((*levels_enf.shape[:2], homes_etl.shape[1] * layout.LANES), levels_enf.dtype)
  for i, homes in enumerate(homes_etl):
    out[i][:, layout.place_of(homes)[: levels_enf.shape[2]]] = levels_enf[i]
  return out


def operands(case, levels, dtype=jnp.float32):
  """Rows outside all groups are NaN; levels of bfloat16's precision."""
  signs, stack = coded(case)
  rng = np.random.default_rng(len(case.name))
  values = np.sort(rng.normal(size=(len(case.sizes), 2, case.f)), axis=1)[:, 2 - levels :]
  values = np.asarray(jnp.asarray(values, jnp.bfloat16), np.float32)
  rows = sum(case.sizes) + case.outside
  x = jnp.asarray(rng.normal(size=(rows, case.d)), dtype).at[sum(case.sizes) :].set(jnp.nan)
  args = (
      x, stack.rows_rl, stack.starts_es, stack.records_es1w, kept(values, stack.homes_etl),
      stack.homes_etl, jnp.array(case.sizes, jnp.int32),
  )
  low = values[:, :1] if levels == 2 else -values
  dense = np.where(signs > 0, values[:, -1:], np.where(signs < 0, low, 0.0)).astype(np.float64)
  y, end = np.zeros((rows, case.f)), 0
  for size, w in zip(case.sizes, dense):
    y[end : end + size] = np.float64(x[end : end + size]) @ w
    end += size
  return tuple(map(jnp.asarray, args)), stack.sizes, y


LEVELS = pytest.mark.parametrize(
    'levels, dtype', [(2, jnp.float32), (1, jnp.bfloat16)], ids=['2_float32', '1_bfloat16']
)


def check(product, case, levels, dtype):
  args, sizes, expected = operands(case, levels, dtype)
  y = product(*args, sizes=sizes)
  assert y.dtype == dtype and y.shape == (args[0].shape[0], case.f)
  step = 2.0**-8 if dtype == jnp.bfloat16 else 1e-6
  np.testing.assert_allclose(
      np.float64(y), expected, rtol=0, atol=step * max(1.0, np.abs(expected).max())
  )


@pytest.mark.long(but=(
    *(f'ref-2_float32-{name}' for name in (
        'one_weight', 'empty_groups', 'many_zeros',
    )),
    'ref-1_bfloat16-tails', 'gpu-2_float32-tails',
    *(f'cpu-2_float32-{case.name}' for case in cases.CHECKED), 'cpu-1_bfloat16-tails',
))
@CASES
@LEVELS
@pytest.mark.parametrize('name', PRODUCTS)
def test_product(name, case, levels, dtype):
  check(PRODUCTS[name], case, levels, dtype)


@pytest.mark.long(but=('2_float32-empty_groups', '2_float32-dense_of_4'))
@CASES
@LEVELS
def test_kernel(case, levels, dtype):
  check(functools.partial(tpu.subbit_matmul, interpret=True), case, levels, dtype)


@pytest.mark.long(but=('8-one_weight', '8-tails', '4-dense', '16-uneven'))
@CASES
@pytest.mark.parametrize('block', layout.SIZES)
def test_every_matrix_comes_back(block, case):
  signs, _ = coded(case)
  stack = encode.encode_stack(signs, block)
  read = jax.jit(decode.kept_words, static_argnames='sizes')
  for e, signs_df in enumerate(signs):
    made = np.asarray(read(*stack[:3], e, sizes=stack.sizes))
    places = layout.place_of(stack.homes_etl[e])[: case.f]
    whole = two_bit.unpack(made[None], 16 * len(made))[0][:, places]
    np.testing.assert_array_equal(whole, layout.in_code(signs_df, 0))
    np.testing.assert_array_equal(layout.from_code(whole, 0, case.d), signs_df)


def test_the_published_share_of_zeros_takes_71_hundredths_of_a_bit():
  case = cases.Case('rate', (1,), 0, 4096, 2048)
  signs, stack = coded(case)
  assert encode.size_for(signs[0]) == 8
  bits = 8 * sum(a.nbytes for a in stack[:4]) + 32 * case.f  # Two bfloat16 levels an output.
  assert bits / (case.d * case.f) <= 0.71


def test_inputs_of_like_density_beside_each_other_cost_nothing():
  """As GPTQ leaves them: the share of zeros changes slowly from input to input."""
  rng = np.random.default_rng(0)
  drift = 0.115 * (1 + 0.9 * np.sin(np.arange(2048) / 300))[None, :, None]
  signs = (rng.random((1, 2048, 1024)) < drift) * rng.choice([-1, 1], size=(1, 2048, 1024))
  orders = (np.arange(2048), rng.permutation(2048))
  sizes = [encode.encode_stack(signs[:, o].astype(np.int8), 8).rows_rl.nbytes for o in orders]
  assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


@pytest.mark.parametrize('zero_share, block', [(0.75, 4), (0.885, 8), (0.98, 16)])
def test_the_block_follows_the_share_of_zeros(zero_share, block):
  case = cases.Case('share', (1,), 0, 1024, 128, zero_share)
  assert encode.size_for(coded(case)[0][0]) == block


@pytest.mark.parametrize('columns', (128, 256, 1408, 4096))
def test_tiles_take_the_longest_and_outputs_come_home(columns):
  order = np.random.default_rng(0).permutation(columns)
  tile, lane = deal.deal(order)
  assert all(set(tile[order[::-1][i : i + 128]]) == {i // 128} for i in range(0, columns, 128))
  home = np.arange(columns) // 128
  for a in (tile, home):
    assert len({*zip(a.tolist(), lane.tolist())}) == columns
  places = layout.place_of(layout.homes(tile, lane))
  np.testing.assert_array_equal(places, tile * 128 + lane)


def test_the_kernel_says_what_it_does_not_take():
  sizes = coded(cases.CHECKED[1])[1].sizes
  assert tpu.supports(1, 2, sizes, jnp.float32) == ''
  assert 'float16' in tpu.supports(1, 2, sizes, jnp.float16)
  assert 'm = 0' in tpu.supports(0, 2, sizes, jnp.float32)
  assert 'patches' in tpu.supports(1, 2, sizes._replace(patches=1 << 17), jnp.float32)
  wide = sizes._replace(f=1 << 17)
  assert 'vector memory' in tpu.supports(256, 2, wide, jnp.float32)


def test_what_the_kernel_does_not_take_goes_by_xla():
  args, sizes, expected = operands(cases.CHECKED[1], 2, jnp.float16)
  traced = jax.jit(functools.partial(api.subbit_matmul, sizes=sizes)).trace(*args)
  assert 'tpu_custom_call' not in traced.lower(lowering_platforms=('tpu',)).as_text()
  np.testing.assert_allclose(api.subbit_matmul(*args, sizes=sizes), expected, atol=2e-2)
  none = api.subbit_matmul(args[0][:0], *args[1:6], jnp.zeros(2, jnp.int32), sizes=sizes)
  assert none.shape == (0, 40)


def test_a_cpu_without_the_extension_goes_by_xla(monkeypatch):
  args, sizes, expected = operands(cases.CHECKED[1], 2)
  run = lambda: jax.jit(functools.partial(api.subbit_matmul, sizes=sizes)).trace(*args).lower()
  if not extension.missing():
    assert extension.SUBBIT_MATMUL in run().as_text()
  monkeypatch.setattr(extension, 'missing', lambda: 'not there')
  assert extension.SUBBIT_MATMUL not in run().as_text()
  y = api.subbit_matmul(*args, sizes=sizes)
  np.testing.assert_allclose(y, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.skipif(bool(extension.missing()), reason='no C++ compiler')
@pytest.mark.parametrize('which, value', [(2, 1 << 20), (2, -5), (3, 1 << 20)])
def test_codes_that_point_elsewhere_are_not_followed(which, value):
  args, sizes, _ = operands(cases.CHECKED[5], 2)
  args = list(args)
  args[which] = jnp.full_like(args[which], value)
  with pytest.raises(jax.errors.JaxRuntimeError, match='damaged'):
    jax.block_until_ready(cpu.subbit_matmul(*args, sizes=sizes))


def test_only_a_tpu_gets_the_kernel():
  args, sizes, _ = operands(cases.CHECKED[1], 2)
  traced = jax.jit(functools.partial(api.subbit_matmul, sizes=sizes)).trace(*args)
  texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ('tpu', 'cuda', 'cpu')}
  assert {p: 'tpu_custom_call' in text for p, text in texts.items()} == {
      'tpu': True, 'cuda': False, 'cpu': False,
  }


def test_shapes_that_do_not_fit_are_named():
  args, sizes, _ = operands(cases.CHECKED[1], 2)
  with pytest.raises(ValueError, match=r'x \(1, 23\), rows'):
    api.subbit_matmul(args[0][:, :23], *args[1:], sizes=sizes)


def test_nothing_dense_is_allocated_on_the_cpu():
  case = cases.Case('memory', (1, 0), 0, 2048, 512)
  args, sizes, _ = operands(case, 2)
  memory = PRODUCTS['ref'].lower(*args, sizes=sizes).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * case.d * case.f / 3


def test_the_cost_counts_each_expert_with_rows_once():
  sizes = coded(cases.CHECKED[1])[1].sizes._replace(d=4096, f=512)
  few, many = (api.cost(4, sizes, active, 0.7, 2) for active in (1, 3))
  assert few.flops == many.flops == 2 * 4 * 4096 * 512
  assert many.bytes_moved - few.bytes_moved == pytest.approx(2 * 4096 * 512 * 0.7 / 8)
