"""Linen shell of router 'selection': it declares what a score is computed from."""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from moejax.config import ModelConfig
from moejax.nn.layers import normal, weight
from moejax.routing import choice, selection
from moejax.routing.types import Routing


def router_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """The router's weights in one layer, by name; of a layer's own config (`of_layer`)."""
  moe = config.moe
  assert moe is not None and moe.selection is not None
  d, e, width, score = config.d_model, moe.held, moe.selection.width, moe.selection.score
  if e == 1:
    return {}
  if score == 'mlp':
    return {'kernel': (d, width), 'out': (width, e)}
  if score == 'norm':
    return {'kernel': (d, width), 'bias': (width,), 'out': (width, e), 'out_bias': (e,)}
  if score == 'swiglu':
    return {'kernel': (d, e), 'up': (d, e)}
  if score in ('oracle', 'random'):
    return {}
  return {'kernel': (d, e), **({'bias': (e,)} if moe.selection.bias else {})}


class SelectionRouter(nn.Module):
  """Scores the experts for each token and selects."""

  config: ModelConfig

  @nn.compact
  def __call__(
      self, x_btd: jax.Array, valid_bt: jax.Array | None = None,
      mass_bte: jax.Array | None = None,
  ) -> Routing:
    """mass_bte: the experts' own activations, for score 'oracle'."""
    moe = self.config.moe
    assert moe is not None and moe.selection is not None
    params = {
        name: weight(self, name, normal(self.config.init_std(shape[0])), shape)
        for name, shape in router_shapes(self.config).items()
    }
    batch, length, d = x_btd.shape
    score = moe.selection.score
    if moe.held == 1:
      scores_bte = jnp.ones((batch, length, 1))
    elif score == 'oracle':
      assert mass_bte is not None
      scores_bte = mass_bte
    elif score == 'random':
      scores_bte = jax.random.uniform(jax.random.key(0), (batch, length, moe.held))
    else:
      x_md = x_btd.reshape(-1, d).astype(jnp.float32)
      scores_bte = choice.scores(params, x_md, score).reshape(batch, length, -1)
    valid_bt = valid_bt if moe.router_ignore_padding_tokens else None
    rule = 'top' if moe.held == 1 else moe.selection.rule
    return selection.route(
        dataclasses.replace(moe.selection, rule=rule), scores_bte, valid_bt
    )
