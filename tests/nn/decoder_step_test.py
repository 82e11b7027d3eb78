"""A prompt that meets empty caches gives what it gives among all slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config as config_lib
from moejax.nn import decoder

SLOTS, NEVER = 24, 1000


@pytest.mark.parametrize('window', [None, 5], ids=['whole', 'window'])
@pytest.mark.parametrize('longest', [1, 9])
def test_a_prompt_and_a_token_after_it(window, longest):
  config = config_lib.DecoderConfig(
      family='mixtral', vocab_size=32, d_model=16, d_head=8, d_ff=16, num_heads=4, num_kv_heads=2,
      num_layers=2, max_positions=256, eos_ids=(1,), sliding_window=window,
      moe=config_lib.DecoderMoeConfig(num_experts=4, top_k=2),
  )
  params = decoder.init(config, jax.random.key(0))
  rng = np.random.RandomState(longest)
  pad = np.array([0, min(4, longest - 1), 0])
  tokens = jnp.asarray(rng.randint(2, 32, (3, longest)), jnp.int32)
  positions = jnp.arange(longest)[None] - pad[:, None]
  slots = jnp.arange(SLOTS)[None] - pad[:, None]
  keys = jnp.where(slots < 0, NEVER, slots)
  step = lambda tokens, caches, at, positions, keys: decoder.step(
      config, params, tokens, caches, at, positions_bt=positions, key_positions_bs=keys,
      length=SLOTS,
  )
  empty = decoder.empty_caches(config, 3, SLOTS)
  given = [step(tokens, empty, 0, positions, k) for k in (None, keys)]
  np.testing.assert_allclose(given[0][0], given[1][0], rtol=1e-5, atol=1e-5)
  after = [
      step(tokens[:, :1], caches, longest, longest - pad[:, None], keys)[0] for _, caches in given
  ]
  np.testing.assert_allclose(*after, rtol=1e-5, atol=1e-5)
