"""Linen shells of the parts every model shares: they declare parameters and call ops."""

from collections.abc import Callable, Sequence
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from moejax import tree
from moejax.config import EncDecConfig, ModelConfig
from moejax.ops import activity, attention, ffn, norm
from moejax.ops import cache as cache_lib
from moejax.ops.activity import Activity
from moejax.ops.linear import linear


def weight(
    module: nn.Module, name: str, init: Callable, shape: Sequence[int], dtype: Any = jnp.float32
) -> Any:
  """A Linen parameter that may also be a weight node of the same logical shape.

  Linen compares leaves one by one and lets a wrong node pass; this compares the logical shape.
  """
  if module.has_variable('params', name):
    value: Any = module.get_variable('params', name)
    if not tree.is_array(value):
      if tuple(value.shape) != tuple(shape):
        path = '/'.join((*module.path, name))
        raise ValueError(f'{path}: node of shape {tuple(value.shape)}, expected {tuple(shape)}')
      return value
  return module.param(name, init, tuple(shape), dtype)


def normal(std: float) -> Callable:
  return nn.initializers.normal(std)


def norm_params(module: nn.Module, c: ModelConfig, name: str = 'norm') -> tuple[Any, Any]:
  """Declares a norm's scale `name` and, for a layer norm, its bias `name`_bias, else None."""
  scale = weight(module, name, nn.initializers.ones, (c.d_model,))
  if getattr(c, 'norm', 'rms') == 'rms':
    return scale, None
  return scale, weight(module, f'{name}_bias', nn.initializers.zeros, (c.d_model,))


def norm_before(c: ModelConfig, x: jax.Array, scale: Any, bias: Any) -> jax.Array:
  """What a block reads of the residual stream."""
  return x if c.post_norm else norm.norm(x, scale, bias, c.norm_eps)


def norm_after(c: ModelConfig, x: jax.Array, scale: Any, bias: Any) -> jax.Array:
  """The residual stream behind a block."""
  return norm.norm(x, scale, bias, c.norm_eps) if c.post_norm else x


class Attention(nn.Module):
  """x + dropout(attend(norm(x))): T5's self-attention, or cross-attention given a source."""

  config: EncDecConfig
  train: bool = False

  def setup(self):
    c = self.config
    heads = (c.num_heads, c.d_kv)
    into = normal(c.init_std(c.d_model))
    self.q = weight(self, 'q', normal(c.init_std(c.d_model * c.d_kv)), (c.d_model, *heads))
    self.k = weight(self, 'k', into, (c.d_model, *heads))
    self.v = weight(self, 'v', into, (c.d_model, *heads))
    self.o = weight(self, 'o', normal(c.init_std(c.num_heads * c.d_kv)), (*heads, c.d_model))
    self.norm = weight(self, 'norm', nn.initializers.ones, (c.d_model,))
    self.dropout = nn.Dropout(c.dropout_rate, deterministic=not self.train)

  def __call__(
      self, x_btd: jax.Array, bias: jax.Array | None, source_bsd: jax.Array | None = None
  ) -> jax.Array:
    normed = norm.rms_norm(x_btd, self.norm, self.config.norm_eps)
    source = normed if source_bsd is None else source_bsd
    params = {'q': self.q, 'k': self.k, 'v': self.v, 'o': self.o}
    y = attention.attend(params, normed, source, bias, self.dropout)
    return x_btd + self.dropout(y)

  def keys_of(self, source_bsd: jax.Array) -> cache_lib.Cache:
    """Keys and values of a source, to be looked at many times."""
    return cache_lib.Cache(
        k_bsgh=linear(source_bsd, self.k), v_bsgh=linear(source_bsd, self.v)
    )

  def look(self, x_btd: jax.Array, bias: jax.Array | None, keys: cache_lib.Cache) -> jax.Array:
    """x + attend(norm(x)) over keys at hand."""
    normed = norm.rms_norm(x_btd, self.norm, self.config.norm_eps)
    q = linear(normed, self.q)
    k, v = keys.k_bsgh.astype(q.dtype), keys.v_bsgh.astype(q.dtype)
    return x_btd + attention.mix({'o': self.o}, q, k, v, bias)

  def extend(
      self, x_btd: jax.Array, bias: jax.Array, cache: cache_lib.Cache, at: jax.Array | int
  ) -> tuple[jax.Array, cache_lib.Cache]:
    """Self-attention of new tokens over those in the cache and themselves."""
    own = self.keys_of(norm.rms_norm(x_btd, self.norm, self.config.norm_eps))
    cache = cache_lib.extend(cache, own.k_bsgh, own.v_bsgh, at)
    return self.look(x_btd, bias, cache), cache


class DenseFfn(nn.Module):
  """x + dropout(ffn(norm(x))), and how active the real tokens' hidden units are, if asked for.

  norm(x + dropout(ffn(x))) in a model that norms behind its blocks.
  """

  config: ModelConfig
  train: bool = False
  observe: bool = False

  @nn.compact
  def __call__(
      self, x_btd: jax.Array, valid_bt: jax.Array | None = None
  ) -> tuple[jax.Array, Activity | None]:
    c = self.config
    scale, bias = norm_params(self, c)
    params = ffn_params(self, c, ())
    dropout = nn.Dropout(c.dropout_rate, deterministic=not self.train)
    normed = norm_before(c, x_btd, scale, bias)
    y, hidden, inputs = ffn.observed_ffn(params, normed, c.act, dropout)
    seen = activity.measure(hidden, inputs, valid_bt) if self.observe else None
    return norm_after(c, x_btd + dropout(y), scale, bias), seen


def ffn_params(
    module: nn.Module, c: ModelConfig, leading: tuple[int, ...], d_ff: int | None = None,
    biases: Sequence[str] | None = None,
) -> dict[str, Any]:
  """Declares wi, wo and, in a gated model, gate, with leading axes (the experts), and biases.

  biases: of which of these; None for all in a dense FFN of a model that has them.
  """
  f = d_ff or c.d_ff
  into = normal(c.init_std(c.d_model))
  params = {
      'wi': weight(module, 'wi', into, (*leading, c.d_model, f)),
      'wo': weight(module, 'wo', normal(c.init_std(f)), (*leading, f, c.d_model)),
  }
  if c.gated:
    params['gate'] = weight(module, 'gate', into, (*leading, c.d_model, f))
  if biases is None:
    biases = tuple(params) if not leading and getattr(c, 'ffn_bias', False) else ()
  for name in biases:
    shape = (*leading, c.d_model if name == 'wo' else f)
    params[f'{name}_bias'] = weight(module, f'{name}_bias', nn.initializers.zeros, shape)
  return params
