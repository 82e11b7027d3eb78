import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config as config_lib
from moejax.model import Model
from moejax.ops import causal


def problem(length, seed=0):
  r = np.random.RandomState(seed)
  draw = lambda *shape: jnp.asarray(r.randn(2, length, *shape), jnp.float32)
  return draw(4, 8), draw(2, 8), draw(2, 8)


def masks(length):
  positions = jnp.broadcast_to(jnp.arange(length), (2, length))
  cut = length // 3
  within = jnp.where(positions < cut, positions, positions - cut)
  segments = jnp.where(positions < cut, 1, 2)
  return {
      'plain': causal.mask(positions, positions),
      'window': causal.mask(positions, positions, window=40),
      'documents': causal.mask(
          within, within, query_segment_bt=segments, key_segment_bs=segments
      ),
  }


def plain_attention(q_btnh, k_bsgh, v_bsgh, mask_b1ts):
  """By loops over heads, float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q_btnh, k_bsgh, v_bsgh))
  out = np.zeros_like(q)
  for head in range(q.shape[2]):
    own = head * k.shape[2] // q.shape[2]
    scores = np.einsum('bth,bsh->bts', q[:, :, head], k[:, :, own]) / np.sqrt(q.shape[-1])
    scores = np.where(np.asarray(mask_b1ts)[:, 0], scores, -np.inf)
    parts = np.exp(scores - scores.max(-1, keepdims=True))
    out[:, :, head] = np.einsum('bts,bsh->bth', parts / parts.sum(-1, keepdims=True), v[:, :, own])
  return out


@pytest.mark.parametrize('length', [1, 128, 129, 300, 1100])
@pytest.mark.parametrize('kind', ['plain', 'window', 'documents'])
def test_blocks_of_queries_are_attention(length, kind):
  args, mask = problem(length), masks(length)[kind]
  blocks = causal.attend(*args, mask, in_order=True)
  np.testing.assert_allclose(blocks, plain_attention(*args, mask), rtol=1e-4, atol=2e-6)
  np.testing.assert_allclose(blocks, causal.attend(*args, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', ['plain', 'documents'])
def test_gradients_of_blocks_are_those_of_the_whole(kind):
  args, mask = problem(300), masks(300)[kind]

  def loss(in_order, *args):
    return (causal.attend(*args, mask, in_order=in_order) ** 2).sum()

  grads = [
      jax.grad(functools.partial(loss, in_order), argnums=(0, 1, 2))(*args)
      for in_order in (False, True)
  ]
  for whole, blocks in zip(*grads):
    np.testing.assert_allclose(blocks, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('length, products', [(128, 2), (129, 4), (512, 8), (1500, 12), (2304, 2)])
def test_long_texts_go_in_blocks(length, products):
  shape = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)
  mask = jax.ShapeDtypeStruct((1, 1, length, length), jnp.bool_)
  text = str(jax.make_jaxpr(functools.partial(causal.attend, in_order=True))(
      shape, shape, shape, mask
  ))
  assert text.count('dot_general[') == products


def decoder():
  return config_lib.DecoderConfig(
      family='llama', vocab_size=32, d_model=16, d_head=8, d_ff=16, num_heads=2, num_kv_heads=1,
      num_layers=2, max_positions=256, eos_ids=(1,), moe=None,
  )


def test_positions_of_ones_own_may_come_in_any_order():
  model = Model.init(decoder(), jax.random.key(0))
  tokens = jnp.asarray(np.random.RandomState(0).randint(2, 32, (1, 200)), jnp.int32)
  backward = jnp.arange(200, dtype=jnp.int32)[None, ::-1]
  logits = model.apply(tokens[:, ::-1], positions_bt=backward).logits_btv
  np.testing.assert_allclose(
      logits[:, ::-1], model.apply(tokens).logits_btv, rtol=1e-4, atol=1e-5
  )
