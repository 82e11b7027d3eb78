"""Balance losses: by hand, global against local, on a mesh, pooled by Hugging Face's formula."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.routing import losses, topk


def test_a_balanced_router_of_k_choices_gives_k():
  # 4 tokens choose (0,1), (1,2), (2,3), (3,0): f = (1/2, ...) * ... each expert 2 choices of 4
  # tokens, so f_e = 1/2 and sums to 2; P = 1/4: 4 * 4 * (1/2 * 1/4) = 2.
  choice = jnp.array([[[0, 1], [1, 2], [2, 3], [3, 0]]])
  probs = jnp.full((1, 4, 4), 0.25)
  assert losses.load_balance_loss(probs, choice, jnp.ones((1, 4))) == pytest.approx(2.0)


def test_what_is_not_chosen_and_padding_do_not_count():
  # Token 0 chooses 0 only, token 1 is padding, token 2 chooses 0 and 1: f = (2, 1) / 2.
  choice = jnp.array([[[0, 1], [0, 1], [0, 1]]])
  chosen = jnp.array([[[True, False], [True, True], [True, True]]])
  weight = jnp.array([[1.0, 0.0, 1.0]])
  probs = jnp.array([[[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]])
  # P = (1.6, 0.4) / 2: 2 * (1 * 0.8 + 0.5 * 0.2).
  got = losses.load_balance_loss(probs, choice, weight, chosen=chosen)
  assert got == pytest.approx(1.8, rel=1e-6)


balance = jax.jit(
    lambda z, k, groups=1: topk.route(z, k, groups=groups).load_balance_loss, static_argnums=(1, 2)
)


def skewed(parts=4, experts=4):
  """Each part of the batch prefers an expert of its own."""
  ideal = np.eye(parts, experts)[:, None, None]
  noise = np.random.default_rng(0).standard_normal((parts, 2, 8, experts))
  return (3 * ideal + 0.1 * noise).reshape(parts * 2, 8, experts).astype(np.float32)


def test_local_is_the_mean_of_the_parts_own_losses():
  logits = skewed()
  local = balance(logits, 2, 4)
  own = [balance(logits[2 * i : 2 * i + 2], 2) for i in range(4)]
  np.testing.assert_allclose(local, np.mean(own), rtol=1e-6)
  together = balance(logits, 2)
  # Balanced as a whole, not in any part.
  assert together == pytest.approx(2.0, abs=0.05) and local > 1.5 * together


def test_a_batch_that_does_not_divide_is_refused():
  with pytest.raises(UserError, match='batch 8 does not divide into 3 groups'):
    topk.route(skewed(), 2, groups=3)


@pytest.mark.parametrize('groups', [1, 4])
def test_the_loss_on_a_mesh_is_that_of_one_device(groups):
  logits = skewed()
  mesh = Mesh(np.array(jax.devices()[:4]), ('data',), axis_types=(AxisType.Auto,))
  fn = jax.value_and_grad(lambda z: topk.route(z, 2, groups=groups).load_balance_loss)
  want, want_grad = jax.jit(fn)(logits)
  spread = jax.device_put(logits, NamedSharding(mesh, PartitionSpec('data')))
  assert len(spread.addressable_shards) == 4
  got, grad = jax.jit(fn)(spread)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  np.testing.assert_allclose(grad, want_grad, atol=3e-8)


pooled = jax.jit(losses.pooled_load_balance_loss, static_argnums=1)


def hugging_face(logits, k, mask=None):
  """The formula of its decoders in numpy: layers concatenated, plain top k, masked means."""
  rows = np.concatenate([np.asarray(z, np.float64) for z in logits])
  probs = np.exp(rows - rows.max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)
  experts = rows.shape[-1]
  picked = np.eye(experts)[np.argsort(-probs, axis=-1, kind='stable')[:, :k]]  # [rows, k, e]
  if mask is None:
    return experts * (picked.mean(0) * probs.mean(0)[None]).sum()
  weight = np.tile(np.asarray(mask, np.float64), len(logits))
  per_expert = (picked * weight[:, None, None]).sum(0) / weight.sum()
  return experts * (per_expert * (probs * weight[:, None]).sum(0)[None] / weight.sum()).sum()


@pytest.mark.parametrize('k', [1, 2, 6])
@pytest.mark.parametrize('masked', [False, True])
def test_pooled_is_hugging_faces(k, masked):
  rng = np.random.default_rng(k)
  logits = [2 * rng.standard_normal((24, 6)).astype(np.float32) for _ in range(3)]
  mask = np.arange(24) % 12 < 7 if masked else None
  got = pooled(logits, k, mask)
  np.testing.assert_allclose(got, hugging_face(logits, k, mask), rtol=1e-6)


def test_pooled_over_layers_with_masks_of_their_own():
  rng = np.random.default_rng(0)
  logits = [rng.standard_normal((m, 4)).astype(np.float32) for m in (10, 6)]
  masks = [np.arange(10) < 7, None]
  want = hugging_face([logits[0][:7], logits[1]], 2)
  got = pooled(logits, 2, masks)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  whole = pooled(logits, 2)
  np.testing.assert_allclose(whole, hugging_face(logits, 2), rtol=1e-6)


def test_pooled_gradient_goes_through_the_probabilities():
  logits = [jnp.log(jnp.array([[3.0, 1.0]]))]
  # f = (1, 0), P = softmax: 2 p_0, so the gradient is 2 p_0 (e_0 - p) = 2 * 3/4 * (1/4, -1/4).
  grad = jax.grad(lambda z: pooled(z, 1))(logits)
  np.testing.assert_allclose(grad[0], [[0.375, -0.375]], rtol=1e-5)


@pytest.mark.parametrize('layers, masks', [(0, None), (2, [None])])
def test_pooled_needs_layers_and_their_masks(layers, masks):
  with pytest.raises(UserError, match=f'{layers} layers of logits and'):
    losses.pooled_load_balance_loss([jnp.zeros((3, 2))] * layers, 1, masks)
