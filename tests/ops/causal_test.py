import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config as config_lib
from moejax import sharding
from moejax.model import Model
from moejax.ops import causal


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


@pytest.mark.parametrize('sizes', [(2, 2, 2), (1, 1, 4), (8, 1, 1)], ids=str)
def test_devices_of_a_mesh_attend_for_their_texts_and_heads(sizes):
  """Also where heads (2 over 4 devices) or texts (4 over 8) do not divide."""
  mesh = sharding.make_mesh(config_lib.MeshConfig(
      data=sizes[0], expert=sizes[1], tensor=sizes[2]
  ))
  rng = np.random.RandomState(0)
  q, k, v = (jnp.asarray(rng.randn(4, 40, n, 8), jnp.float32) for n in (4, 2, 2))
  segments = jnp.where(jnp.arange(40) < 15, 1, 2)[None].repeat(4, 0)
  position = jnp.where(segments == 1, jnp.arange(40), jnp.arange(40) - 15)
  mask = causal.mask(position, position, query_segment_bt=segments, key_segment_bs=segments)

  def loss(q, k, v, mesh):
    y = causal.attend(q, k, v, mask, in_order=True, segment_bt=segments, mesh=mesh)
    return (y ** 2).sum(), y

  run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
  jax.tree.map(
      lambda one, many: np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5),
      run(q, k, v, None), run(q, k, v, mesh),
  )
