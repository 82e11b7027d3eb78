"""The product from codewords against float64, on every listed case."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.codeword_matvec import api, cases
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


def test_cost_counts_codes_and_nonzeros():
  cost = api.cost(768, 3072, 0.667, 0.885)
  assert cost.bytes_moved == pytest.approx(768 * 3072 * 0.667 / 8 + 4 * 3840)
  assert cost.flops == pytest.approx(768 * 3072 * 0.115 + 4 * 768)
