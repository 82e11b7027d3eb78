"""expert_dot on weight nodes: dense results, gradients, and one expert's memory."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas import extension
from moejax import weights
from moejax.ops import compressed
from moejax.ops.expert_dot import expert_dot

VECTORS = Path(__file__).parent.parent / 'vectors' / 'qmoe'
E, ROWS, COLS = 6, 40, 72


def symbols(shape=(E, ROWS, COLS), high=3, seed=0):
  p = [0.885, 0.0575, 0.0575] if high == 3 else None
  return np.random.default_rng(seed).choice(high, size=shape, p=p).astype(np.uint8)


def levels(shape=(E, ROWS), seed=1):
  size = np.abs(np.random.default_rng(seed).normal(size=(*shape, 2))) + 0.1
  return (size * [-1, 1]).astype(np.float32)


def make(name):
  if name == 'ternary':
    return weights.Ternary.from_symbols(symbols(), levels())
  if name == 'ternary_v1':
    return weights.TernaryV1.from_symbols(symbols(), levels())
  if name == 'block_ternary':
    return weights.BlockTernary.from_symbols(symbols(), levels())
  if name.startswith('packed_ternary'):
    size = np.abs(levels()) if name.endswith('two') else np.abs(levels()[..., 1:])
    return weights.PackedTernary.from_symbols(symbols(), size * [-1, 1])
  if name == 'packed':
    scale = levels()[..., 1] / 4
    return weights.Packed.from_symbols(symbols(high=8), scale, np.full_like(scale, 3), bits=3)
  if name.startswith('low_rank'):
    rng = np.random.default_rng(2)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    keep = rng.random((E, ROWS)) < np.array([0, 0.1, 0.2, 0.3, 0.4, 0.5])[:, None]
    node = weights.LowRankSparse.from_dense(
        draw(E, COLS, 4), draw(E, 4, ROWS), draw(E, COLS, ROWS), keep
    )
    if name.endswith('sparse'):
      return node
    kept = symbols((E, node.index.shape[1], COLS))
    return dataclasses.replace(
        node, kept=weights.PackedTernary.from_symbols(kept, levels(kept.shape[:2]))
    )
  parts = [make('ternary'), make('packed')]
  parts = [jax.tree.map(lambda a: a[:2], parts[1]), weights.Ternary.from_symbols(
      symbols()[:3], levels()[:3]
  ), np.ones((1, COLS, ROWS), ml_dtypes.bfloat16)]
  return weights.Mixed.from_parts(parts, [[4, 1], [0, 2, 5], [3]])


NODES = (
    'ternary', 'ternary_v1', 'packed', 'packed_ternary_one', 'packed_ternary_two', 'block_ternary',
    'low_rank_sparse', 'low_rank_ternary', 'mixed',
)
each_node = pytest.mark.parametrize('name', NODES)


@pytest.mark.long(but=tuple(f'sizes0-{name}' for name in NODES))
@each_node
@pytest.mark.parametrize(
    'sizes', [[3, 0, 5, 1, 0, 7], [0] * 6, [0, 0, 0, 0, 0, 1], [40, 0, 0, 0, 0, 0]]
)
def test_equals_the_dense_product(name, sizes):
  node = make(name)
  x = jax.random.normal(jax.random.key(0), (40, COLS))
  sizes = jnp.asarray(sizes, jnp.int32)
  got = jax.jit(expert_dot)(x, node, sizes)
  want = jax.jit(expert_dot)(x, node.dense(jnp.float32), sizes)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  assert not np.asarray(got)[int(sizes.sum()) :].any()


@pytest.mark.parametrize('rows', (1, 40))
def test_codewords_without_the_extension(rows, monkeypatch):
  monkeypatch.setattr(compressed.codewords, 'supports', lambda: 'not there')
  node, x = make('ternary'), jax.random.normal(jax.random.key(0), (rows, COLS))
  sizes = jnp.asarray([0, 0, rows - rows // 2, 0, rows // 2, 0], jnp.int32)
  run = jax.jit(compressed.ternary_dot)
  assert 'moejax_' not in run.lower(x, node, sizes).as_text()
  want = jax.jit(expert_dot)(x, node.dense(jnp.float32), sizes)
  np.testing.assert_allclose(run(x, node, sizes), want, rtol=1e-5, atol=1e-5)


@each_node
@pytest.mark.parametrize('platform', ('tpu', 'cuda'))
def test_it_lowers_for_accelerators(name, platform):
  sizes = jnp.asarray([3, 0, 5, 1, 0, 7], jnp.int32)
  traced = jax.jit(expert_dot).trace(jnp.ones((16, COLS)), make(name), sizes)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  own_kernel = platform == 'tpu' and name.startswith(('packed', 'block_ternary', 'low_rank'))
  assert ('tpu_custom_call' in text) == own_kernel


@pytest.mark.long(but=('ternary', 'packed', 'packed_ternary_one', 'low_rank_ternary', 'mixed'))
@each_node
def test_gradient_in_x_equals_the_dense_one(name):
  node = make(name)
  x = jax.random.normal(jax.random.key(0), (16, COLS))
  sizes = jnp.asarray([3, 0, 5, 1, 0, 7], jnp.int32)
  loss = lambda x, w: jnp.sum(expert_dot(x, w, sizes) ** 2)
  got = jax.jit(jax.grad(loss))(x, node)
  want = jax.jit(jax.grad(loss))(x, node.dense(jnp.float32))
  # Sums that cancel are as exact as their largest terms.
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.long(but=('ternary_v1', 'packed', 'packed_ternary_two', 'low_rank_sparse'))
@each_node
def test_gradient_in_levels_is_that_of_the_dense_weights(name):
  node = make(name)
  x = jax.random.normal(jax.random.key(0), (16, COLS))
  sizes = jnp.asarray([3, 0, 5, 1, 0, 7], jnp.int32)
  floats = lambda n: [a for a in jax.tree.leaves(n) if jnp.issubdtype(a.dtype, jnp.inexact)]

  def filled(values):
    values = iter(values)
    return jax.tree.map(
        lambda a: next(values) if jnp.issubdtype(a.dtype, jnp.inexact) else a, node
    )

  values = [jnp.asarray(a, jnp.float32) for a in floats(node)]
  got = jax.jit(jax.grad(lambda v: jnp.sum(expert_dot(x, filled(v), sizes) ** 2)))(values)

  def dense_loss(v):
    owner = jnp.repeat(jnp.arange(E), sizes, total_repeat_length=16)
    return jnp.sum(jnp.einsum('md,mdf->mf', x, filled(v).dense(jnp.float32)[owner]) ** 2)

  want = jax.jit(jax.grad(dense_loss))(values)
  assert any(np.abs(np.asarray(g)).max() > 0.1 for g in want)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('expert', [0, 4, None])
def test_one_token_goes_straight_from_the_codes(expert):
  shares = (0.885, 0.5, 1.0, 0.95, 0.7)
  rng = np.random.default_rng(0)
  s = np.stack([
      rng.choice(3, size=(ROWS, COLS), p=[p, (1 - p) / 2, (1 - p) / 2]) for p in shares
  ])
  node = weights.Ternary.from_symbols(s, levels((5, ROWS)))
  x = jax.random.normal(jax.random.key(0), (1, COLS))
  sizes = np.zeros(5, np.int32)
  if expert is not None:
    sizes[expert] = 1
  want = np.zeros(ROWS) if expert is None else x[0] @ node.expert(expert, jnp.float32)
  run = jax.jit(expert_dot)
  np.testing.assert_allclose(run(x, node, sizes)[0], want, rtol=1e-5, atol=1e-5)
  memory = run.lower(x, node, sizes).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 40 * node.max_words + 2**16


@pytest.mark.parametrize('name', ['gptq', 'synthetic'])
def test_qmoe_matvec_vectors(name):
  vectors = np.load(VECTORS / 'sub1linear.npz')
  node = weights.TernaryV1.from_values(vectors[f'{name}_W'][None])
  x, exact = jnp.asarray(vectors[f'{name}_x']), vectors[f'{name}_y_f64']
  sizes = jnp.asarray([x.shape[0]], jnp.int32)
  y = np.asarray(expert_dot(x, node, sizes))
  assert np.abs(y - exact).max() <= 1e-5 * np.abs(exact).max()
  y = np.asarray(expert_dot(x.astype(jnp.bfloat16), node, sizes)).astype(np.float64)
  # x is exact in bf16, so only the output is rounded.
  assert (np.abs(y - exact) <= 2**-8 * np.abs(exact) + 1e-4 * np.abs(exact).max()).all()


@pytest.mark.parametrize('name', ['ternary', 'ternary_v1', 'packed'])
def test_at_most_one_expert_is_expanded_in_xla(name, monkeypatch):
  monkeypatch.setattr(extension, 'without', lambda *dtypes: 'not there')
  experts, rows, cols, tokens = 16, 256, 1024, 8
  if name == 'packed':
    s = symbols((experts, rows, cols), high=8)
    scale = levels((experts, rows))[..., 1]
    node = weights.Packed.from_symbols(s, scale, np.zeros_like(scale), bits=3)
  else:
    node_class = weights.Ternary if name == 'ternary' else weights.TernaryV1
    node = node_class.from_symbols(symbols((experts, rows, cols)), levels((experts, rows)))
  x, sizes = jnp.zeros((tokens, cols)), jnp.zeros(experts, jnp.int32)
  memory = jax.jit(expert_dot).lower(x, node, sizes).compile().memory_analysis()
  one_expert = rows * cols * 4
  padded_tokens = 4 * (tokens + 64) * (rows + cols)
  # The matrix in float32, its int8 ternary form and the codewords' positions.
  assert memory.temp_size_in_bytes < 1.5 * one_expert + padded_tokens
  assert memory.temp_size_in_bytes > 0
