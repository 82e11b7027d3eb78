"""T5 attention's parts: buckets, bias, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import attention, norm


def test_buckets_by_hand():
  # 8 buckets one way: 4 exact distances, then bucket 4 + floor(4 ln(d/4) / ln 4) up to 16.
  buckets = attention.relative_buckets(
      17, 17, bidirectional=False, num_buckets=8, max_distance=16
  )
  last = buckets[16][::-1]  # distances 0 .. 16 back from the last place
  np.testing.assert_array_equal(
      last, [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7]
  )
  assert (buckets[0][1:] == 0).all()


@pytest.mark.torch
@pytest.mark.parametrize('bidirectional', [True, False])
def test_buckets_equal_transformers(bidirectional):
  import torch
  from transformers.models.t5.modeling_t5 import T5Attention

  relative = torch.arange(700)[None, :] - torch.arange(700)[:, None]
  theirs = T5Attention._relative_position_bucket(relative, bidirectional, 32, 128)
  ours = attention.relative_buckets(
      700, 700, bidirectional=bidirectional, num_buckets=32, max_distance=128
  )
  np.testing.assert_array_equal(ours, theirs.numpy())


def test_bias_looks_up_the_table():
  table = jax.random.normal(jax.random.key(0), (8, 3))
  buckets = np.array([[0, 7, 2], [1, 0, 5]])
  np.testing.assert_allclose(
      attention.relative_bias(table, buckets), np.asarray(table)[buckets].transpose(2, 0, 1)
  )


def test_masks():
  mask = jnp.array([[True, False, True]])
  bias = attention.mask_bias(mask, 3, causal=True)
  open_ = np.asarray(bias[0, 0]) == 0
  np.testing.assert_array_equal(open_, [[1, 0, 0], [1, 0, 0], [1, 0, 1]])
  assert attention.mask_bias(None, 3, causal=False) is None


def test_attention_is_not_scaled():
  # One head of width 4, q = k = 2 at one source and 0 at the other: scores 16 and 0, not 8.
  params = {name: jnp.eye(4)[:, None, :] for name in ('q', 'k', 'v')}
  params['o'] = jnp.eye(4)[None]
  x = jnp.full((1, 1, 4), 2.0)
  source = jnp.stack([jnp.full((4,), 2.0), jnp.zeros(4)])[None]
  out = attention.attend(params, x, source, None)
  np.testing.assert_allclose(out, 2.0 / (1.0 + np.exp(-16.0)), rtol=1e-6)


def test_rms_norm_in_float32():
  x = jnp.full((2, 8), 1e-2, jnp.bfloat16)
  y = norm.rms_norm(x, jnp.full((8,), 3.0), 1e-6)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(y, np.float32), 3 * 0.01 / np.sqrt(1e-4 + 1e-6), rtol=1e-2)
