"""The products from codewords against float64, on every listed case."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import extension
from kernels_pallas.codeword_matmul import api, cases
from moejax import weights
from moejax.codec import ternary, ternary_jax


def operands(case):
  rng = np.random.default_rng(0)
  p = [case.zero_share, (1 - case.zero_share) / 2, (1 - case.zero_share) / 2]
  symbols = rng.choice(3, size=(1, case.rows, case.cols), p=p)
  encoded = ternary.encode(symbols, block_rows=case.block_rows or None)
  levels = np.stack([-1 - rng.random(case.rows), 1 + rng.random(case.rows)], 1).astype(np.float32)
  x = rng.normal(size=case.cols).astype(np.float32)
  dense = np.where(symbols[0] == 1, levels[:, :1], np.where(symbols[0] == 2, levels[:, 1:], 0))
  table = ternary_jax.decode_table(int(encoded.design_e[0]))
  args = (x, encoded.words_w, encoded.offsets_eb[0].astype(np.int32), levels, table.length_u,
          table.fields_ju)
  static = {'field_bits': table.bits, 'max_length': int(table.length_u.max()),
            'block_rows': encoded.block_rows}
  return args, static, dense.astype(np.float64) @ x


@pytest.mark.parametrize('case', cases.CHECKED, ids=lambda c: c.name)
def test_equals_the_exact_product(case):
  args, static, exact = operands(case)
  y = jax.jit(functools.partial(api.codeword_matvec, **static))(*map(jnp.asarray, args))
  assert y.dtype == jnp.float32
  assert np.abs(np.asarray(y) - exact).max() <= 1e-5 * max(np.abs(exact).max(), 1e-3)


def test_codewords_of_other_matrices_in_the_window_do_not_count():
  args, static, exact = operands(cases.CHECKED[3])
  x, words, offsets, *rest = args
  around = np.concatenate([words[:7], words, words[:5]])
  run = jax.jit(functools.partial(api.codeword_matvec, **static))
  y = run(x, around, offsets + 7, *rest)
  np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-4)


def test_nothing_dense_is_allocated():
  case = cases.Case('memory', 256, 1024, 0.885)
  args, static, _ = operands(case)
  run = jax.jit(functools.partial(api.codeword_matvec, **static))
  memory = run.lower(*map(jnp.asarray, args)).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * case.rows * case.cols / 2


EXPERTS = pytest.mark.skipif(bool(extension.missing()), reason='no C++ compiler')


def experts_operands(case, sizes, outside, dtype, shards):
  """Experts from dense to sparse, so of several tables; rows outside all groups are NaN."""
  rng = np.random.default_rng(1)
  e, rows = len(sizes), sum(sizes) + outside
  zeros = np.linspace(case.zero_share, 1.0, e)
  symbols = np.stack([
      rng.choice(3, size=(case.rows, case.cols), p=[p, (1 - p) / 2, (1 - p) / 2]) for p in zeros
  ])
  levels = np.sort(rng.normal(size=(e, case.rows, 2))).astype(np.float32)
  node = weights.Ternary.from_symbols(
      symbols, levels, block_rows=case.block_rows or None, level_dtype=np.float32
  ).sharded(shards)
  x = jnp.asarray(rng.normal(size=(rows, case.cols)), dtype).at[sum(sizes) :].set(jnp.nan)
  dense = np.where(symbols == 1, levels[..., :1], np.where(symbols == 2, levels[..., 1:], 0.0))
  y, end = np.zeros((rows, case.rows)), 0
  for size, w in zip(sizes, dense):
    y[end : end + size] = np.float64(x[end : end + size]) @ w.T
    end += size
  args = (node.words, node.offsets, node.tables(), node.levels, ternary_jax.entries(node.designs))
  args = (x, *map(jnp.asarray, args), jnp.asarray(sizes, jnp.int32))
  return args, node.block_rows, y


@EXPERTS
@pytest.mark.parametrize('dtype', (jnp.float32, jnp.bfloat16), ids=('float32', 'bfloat16'))
@pytest.mark.parametrize('sizes, outside, shards', [
    ((1, 0, 2, 5), 0, 1), ((0, 0, 0, 0), 3, 1), ((70, 0, 9, 1), 4, 2), ((0, 150, 0, 17), 0, 4),
], ids=('few', 'none', 'tails', 'many'))
@pytest.mark.parametrize('case', cases.CHECKED, ids=lambda c: c.name)
def test_rows_of_experts(case, sizes, outside, shards, dtype):
  args, block_rows, expected = experts_operands(case, sizes, outside, dtype, shards)
  y = jax.jit(functools.partial(api.codeword_matmul, block_rows=block_rows))(*args)
  assert y.dtype == dtype and y.shape == expected.shape
  step = 2.0**-8 if dtype == jnp.bfloat16 else 1e-6
  np.testing.assert_allclose(
      np.float64(y), expected, rtol=0, atol=step * max(1.0, np.abs(expected).max())
  )


@EXPERTS
def test_a_batch_of_products():
  args, block_rows, expected = experts_operands(cases.CHECKED[3], (3, 2), 1, jnp.float32, 1)
  run = functools.partial(api.codeword_matmul, block_rows=block_rows)
  batched = jax.vmap(run, in_axes=(0, *[None] * 6))
  y = jax.jit(batched)(jnp.stack([args[0], 2 * args[0]]), *args[1:])
  np.testing.assert_allclose(y[0], expected, atol=1e-5)
  np.testing.assert_allclose(y[1], 2 * expected, atol=2e-5)


@EXPERTS
def test_codes_that_point_elsewhere_are_not_followed():
  args, block_rows, _ = experts_operands(cases.CHECKED[3], (3, 2), 1, jnp.float32, 1)
  for which, change in ((2, lambda a: a + np.uint32(1 << 20)), (2, lambda a: a[:, ::-1]),
                        (3, lambda a: a + 9)):
    broken = [change(a) if i == which else a for i, a in enumerate(args)]
    with pytest.raises(jax.errors.JaxRuntimeError, match='damaged'):
      jax.block_until_ready(api.codeword_matmul(*broken, block_rows=block_rows))


def test_shapes_that_do_not_fit_are_named():
  args, block_rows, _ = experts_operands(cases.CHECKED[3], (3, 2), 1, jnp.float32, 1)
  with pytest.raises(ValueError, match=r'offsets \(2, 11\).* blocks of 7 rows'):
    api.codeword_matmul(*args, block_rows=7)


def test_cost_counts_codes_and_nonzeros():
  cost = api.cost(768, 3072, 0.667, 0.885)
  assert cost.bytes_moved == pytest.approx(768 * 3072 * 0.667 / 8 + 4 * 3840)
  assert cost.flops == pytest.approx(768 * 3072 * 0.115 + 4 * 768)
