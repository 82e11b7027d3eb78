"""What an aligned start promises: locality in the encoder, matching in cross-attention."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax import config as config_lib
from moejax import model, tree
from moejax.nn import aligned
from moejax.ops import attention, linear, norm

CONFIG = config_lib.EncDecConfig(
    family='t5', vocab_size=97, d_model=64, d_kv=16, d_ff=64, num_heads=4, num_layers=2,
    num_decoder_layers=2,
)


def test_only_queries_and_encoder_bias_change():
  params = model.init_params(CONFIG, jax.random.key(0))
  changed = tree.flatten(aligned.align(params, CONFIG))
  differing = {p for p, a in tree.flatten(params).items() if not np.array_equal(a, changed[p])}
  assert differing == {
      'encoder/relative_bias', 'decoder/layers_0/cross_attention/q',
      'decoder/layers_1/cross_attention/q',
  }


def test_heads_look_left_right_and_around():
  table = aligned.local_bias(CONFIG)
  row = attention.relative_buckets(
      9, 9, bidirectional=True, num_buckets=32, max_distance=128
  )[4]
  bias = table[row]  # [9 places around place 4, heads]
  assert (np.diff(bias[:5, 0]) > 0).all() and (bias[5:, 0] == -6).all()
  assert (np.diff(bias[4:, 1]) < 0).all() and (bias[:4, 1] == -6).all()
  np.testing.assert_allclose(bias[:, 2], -0.5 * np.abs(np.arange(-4, 5)))
  np.testing.assert_allclose(bias[:, 3], -0.15 * np.abs(np.arange(-4, 5)), rtol=1e-6)


def test_a_token_finds_itself_among_others():
  params = aligned.align(model.init_params(CONFIG, jax.random.key(0)), CONFIG)
  cross = params['decoder']['layers_0']['cross_attention']
  x = norm.rms_norm(jax.random.normal(jax.random.key(1), (1, 32, 64)), jnp.ones(64), 1e-6)
  q, k = linear.linear(x, cross['q']), linear.linear(x, cross['k'])
  scores = np.asarray(jnp.einsum('btnh,bsnh->bnts', q, k))
  assert (scores.argmax(-1) == np.arange(32)).mean() > 0.9
