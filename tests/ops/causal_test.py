import jax
import jax.numpy as jnp
import numpy as np

from moejax import config as config_lib
from moejax.model import Model


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
