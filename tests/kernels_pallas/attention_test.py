"""Attention and its gradients against float64, in C++ and by XLA."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import extension
from kernels_pallas.attention import api, cpu, ref, tpu, vjp
from moejax.ops import causal

needs_cpp = pytest.mark.skipif(bool(extension.missing()), reason=extension.missing())
WAYS = {
    'xla': functools.partial(ref.attend, in_order=False),
    'xla_blocks': functools.partial(ref.attend, in_order=True),
    'cpu': functools.partial(vjp.attend, in_order=True),
}


def by_tpu(case):
  """The TPU kernel's arguments after q, k and v: it reads no mask."""
  cut = case.t // 3
  segment = jnp.where(jnp.arange(case.t) < cut, 1, 2)[None].repeat(case.b, 0)
  return (
      segment if case.kind == 'documents' else None, 40 if case.kind == 'window' else None
  )


WAY = pytest.mark.parametrize('way', ['xla', 'xla_blocks', pytest.param('cpu', marks=needs_cpp)])


class Case(NamedTuple):
  t: int
  s: int
  n: int = 4
  g: int = 2
  h: int = 8
  kind: str = 'causal'
  b: int = 2


CASES = (
    Case(1, 1), Case(128, 128), Case(129, 129, h=64), Case(300, 300, h=20),
    Case(300, 300, kind='window'), Case(300, 300, kind='documents', n=8, g=8, h=32),
    Case(300, 300, kind='holes', n=3, g=1), Case(150, 150, kind='both', n=6, g=3),
    Case(1100, 1100, b=1), Case(1100, 1100, kind='window', h=16), Case(700, 700, kind='holes', b=1),
    Case(600, 600, kind='both', n=2, g=2, h=40), Case(1, 700, kind='slots', n=8),
    Case(5, 40, kind='slots', n=300, g=1), Case(70, 650, kind='slots', h=128), Case(9, 33, h=3),
)


def on(*cases):
  """Each way with the cases that it takes: blocks want one text in order."""
  return pytest.mark.parametrize('way, case', [
      pytest.param(
          way, case, id=f'{way}-{case.kind}_{case.t}_{case.s}_{case.h}',
          marks=[needs_cpp] if way == 'cpu' else [],
      )
      for way in WAYS for case in cases
      if way != 'xla_blocks' or (case.t == case.s and case.kind != 'both')
  ])


def mask_of(case):
  """A kind of mask; every query sees a key."""
  row = lambda length: jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (case.b, length))
  query, key = row(case.t), row(case.s)
  if case.kind == 'both':
    return causal.mask(query, key, causal=False)
  if case.kind == 'documents':
    cut = case.t // 3
    within = jnp.where(query < cut, query, query - cut)
    segment = jnp.where(query < cut, 1, 2)
    return causal.mask(within, within, query_segment_bt=segment, key_segment_bs=segment)
  if case.kind == 'holes':
    mask = causal.mask(query, key)
    return mask & ((query[:, None, :, None] + 3 * key[:, None, None, :]) % 7 < 4) | (
        query[:, None, :, None] == key[:, None, None, :]
    )
  if case.kind == 'slots':  # The second prompt is shorter, and slots are left.
    short = case.s // 3 * jnp.arange(case.b)[:, None]
    filled = key < case.s - 3
    key = jnp.where(filled & (key >= short), key - short, case.s + 1)
    return causal.mask(query + case.s - 3 - case.t - short, key)
  return causal.mask(query, key, window=40 if case.kind == 'window' else None)


def problem(case, dtype=jnp.float32):
  rng = np.random.RandomState(case.t + case.h)
  draw = lambda *shape: jnp.asarray(rng.randn(case.b, *shape), dtype)
  qkv = (draw(case.t, case.n, case.h), *(draw(case.s, case.g, case.h) for _ in range(2)))
  return qkv, mask_of(case), draw(case.t, case.n, case.h)


def attention64(qkv, mask, dout):
  """Attention and the gradients of its three inputs by loops over heads, float64."""
  q, k, v, dout = (np.asarray(x, np.float64) for x in (*qkv, dout))
  out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  scale = q.shape[-1] ** -0.5
  for head in range(q.shape[2]):
    own = head * k.shape[2] // q.shape[2]
    scores = np.einsum('bth,bsh->bts', q[:, :, head], k[:, :, own]) * scale
    scores = np.where(np.asarray(mask)[:, 0], scores, -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    out[:, :, head] = np.einsum('bts,bsh->bth', probs, v[:, :, own])
    dprobs = np.einsum('bth,bsh->bts', dout[:, :, head], v[:, :, own])
    dscores = scale * probs * (dprobs - (dprobs * probs).sum(-1, keepdims=True))
    dq[:, :, head] = np.einsum('bts,bsh->bth', dscores, k[:, :, own])
    dk[:, :, own] += np.einsum('bts,bth->bsh', dscores, q[:, :, head])
    dv[:, :, own] += np.einsum('bts,bth->bsh', probs, dout[:, :, head])
  return out, (dq, dk, dv)


@on(*CASES)
def test_attention_and_its_gradients(way, case):
  qkv, mask, dout = problem(case)
  expected, gradients = attention64(qkv, mask, dout)
  out, pull = jax.vjp(lambda *qkv: WAYS[way](*qkv, mask), *qkv)
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=2e-6)
  for got, wanted in zip(pull(dout), gradients):
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@on(CASES[2], CASES[12])
def test_bfloat16(way, case):
  qkv, mask, dout = problem(case, jnp.bfloat16)
  expected, gradients = attention64(qkv, mask, dout)
  out, pull = jax.vjp(lambda *qkv: WAYS[way](*qkv, mask), *qkv)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float64(out), expected, rtol=2e-2, atol=1e-2)
  for got, wanted in zip(pull(dout), gradients):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(got), wanted, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize('case', [
    Case(256, 256, h=64, b=1), Case(300, 300, kind='window', b=1),
    Case(290, 290, kind='documents', h=128),
], ids=lambda c: c.kind)
def test_the_tpu_kernel(case):
  """Interpreted, bfloat16."""
  qkv, mask, dout = problem(case, jnp.bfloat16)
  expected, gradients = attention64(qkv, mask, dout)
  run = lambda *qkv: tpu.attend(*qkv, *by_tpu(case), interpret=True)
  out, pull = jax.vjp(run, *qkv)
  assert not tpu.supports(case.t, case.s, True, *(x.dtype for x in qkv))
  np.testing.assert_allclose(np.float64(out), expected, rtol=2e-2, atol=2e-2)
  for got, wanted in zip(pull(dout), gradients):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(got), wanted, rtol=5e-2, atol=1e-1)


@needs_cpp
def test_great_scores():
  qkv, mask, dout = problem(CASES[3])
  qkv = (300 * qkv[0], *qkv[1:])
  expected, _ = attention64(qkv, mask, dout)
  out, pull = jax.vjp(lambda *qkv: WAYS['cpu'](*qkv, mask), *qkv)
  np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)
  assert all(np.isfinite(d).all() for d in pull(dout))


@needs_cpp
def test_a_query_that_sees_nothing_gets_nothing_and_gives_none():
  qkv, mask, dout = problem(CASES[3])
  mask = mask.at[0, 0, 7].set(False)
  out, pull = jax.vjp(lambda *qkv: WAYS['cpu'](*qkv, mask), *qkv)
  dq, dk, dv = pull(dout)
  assert not out[0, 7].any() and not dq[0, 7].any()
  zero = dout.at[0, 7].set(0)
  for got, wanted in zip((dk, dv), pull(zero)[1:]):
    np.testing.assert_array_equal(got, wanted)


@WAY
@pytest.mark.parametrize('which', [0, 1, 2], ids='qkv')
def test_what_is_no_number_stays_none(way, which):
  """A query's for itself, a key's and a value's for all that see it."""
  qkv, mask, dout = problem(CASES[3])
  qkv = [x.at[0, 7, 0].set(jnp.nan) if i == which else x for i, x in enumerate(qkv)]
  out, pull = jax.vjp(lambda *qkv: WAYS[way](*qkv, mask), *qkv)
  assert np.isnan(out[0, 7, 0]).any() and np.isfinite(out[1]).all()
  assert which == 0 or np.isnan(out[0, 8, 0]).any()
  assert np.isfinite(out[0, 9:]).all() == (which == 0)
  assert all(np.isnan(d[0]).any() and np.isfinite(d[1]).all() for d in pull(dout)[:2])


@needs_cpp
def test_one_mask_for_all_texts():
  qkv, mask, _ = problem(CASES[3])
  np.testing.assert_array_equal(
      WAYS['cpu'](*qkv, mask[:1]), WAYS['cpu'](*qkv, jnp.broadcast_to(mask[:1], mask.shape))
  )


@needs_cpp
def test_gradients_are_the_same_each_time():
  qkv, mask, dout = problem(CASES[8])
  out, whole = cpu.attend(*qkv, mask)
  runs = [cpu.gradients(*qkv, mask, out, whole, dout) for _ in range(5)]
  for other in runs[1:]:
    jax.tree.map(np.testing.assert_array_equal, runs[0], other)


@needs_cpp
def test_a_long_text_holds_no_scores():
  """Of 16,384 tokens and 4 heads they would take 4 GiB."""
  struct = lambda heads: jax.ShapeDtypeStruct((1, 16384, heads, 64), jnp.float32)
  mask = jax.ShapeDtypeStruct((1, 1, 16384, 16384), jnp.bool_)

  def loss(q, k, v, mask):
    return (api.attend(q, k, v, mask, in_order=True) ** 2).sum()

  compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(
      struct(4), struct(1), struct(1), mask
  ).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 2**28


@pytest.mark.parametrize('length, products', [(128, 2), (129, 4), (512, 8), (1500, 12), (2304, 2)])
def test_long_texts_go_in_blocks(length, products):
  shape = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)
  mask = jax.ShapeDtypeStruct((1, 1, length, length), jnp.bool_)
  text = str(jax.make_jaxpr(functools.partial(ref.attend, in_order=True))(
      shape, shape, shape, mask
  ))
  assert text.count('dot_general[') == products


def test_shapes_that_do_not_fit():
  qkv, mask, _ = problem(CASES[3])
  with pytest.raises(ValueError, match=r'attention: q \(2, 300, 4, 20\).* do not fit'):
    api.attend(*qkv, mask[:, :, :, 1:])
