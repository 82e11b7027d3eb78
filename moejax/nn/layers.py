"""Linen shells of the parts every model shares: they declare parameters and call ops."""

from collections.abc import Callable, Sequence
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from moejax import tree
from moejax.config import EncDecConfig, ModelConfig
from moejax.ops import attention, ffn, norm


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


class Attention(nn.Module):
  """x + dropout(attend(norm(x))): self-attention, or cross-attention given a source."""

  config: EncDecConfig
  train: bool = False

  @nn.compact
  def __call__(
      self, x_btd: jax.Array, bias: jax.Array | None, source_bsd: jax.Array | None = None
  ) -> jax.Array:
    c = self.config
    heads = (c.num_heads, c.d_kv)
    into = normal(c.init_std(c.d_model))
    params = {
        'q': weight(self, 'q', normal(c.init_std(c.d_model * c.d_kv)), (c.d_model, *heads)),
        'k': weight(self, 'k', into, (c.d_model, *heads)),
        'v': weight(self, 'v', into, (c.d_model, *heads)),
        'o': weight(self, 'o', normal(c.init_std(c.num_heads * c.d_kv)), (*heads, c.d_model)),
    }
    scale = weight(self, 'norm', nn.initializers.ones, (c.d_model,))
    normed = norm.rms_norm(x_btd, scale, c.norm_eps)
    dropout = nn.Dropout(c.dropout_rate, deterministic=not self.train)
    source = normed if source_bsd is None else source_bsd
    y = attention.attend(params, normed, source, bias, dropout)
    return x_btd + dropout(y)


class DenseFfn(nn.Module):
  """x + dropout(ffn(norm(x)))."""

  config: ModelConfig
  train: bool = False

  @nn.compact
  def __call__(self, x_btd: jax.Array) -> jax.Array:
    c = self.config
    scale, bias = norm_params(self, c)
    params = ffn_params(self, c, ())
    dropout = nn.Dropout(c.dropout_rate, deterministic=not self.train)
    y = ffn.dense_ffn(params, norm.norm(x_btd, scale, bias, c.norm_eps), c.activation, dropout)
    return x_btd + dropout(y)


def ffn_params(
    module: nn.Module, c: ModelConfig, leading: tuple[int, ...], d_ff: int | None = None
) -> dict[str, Any]:
  """Declares wi, wo and, in a gated model, gate, with leading axes (the experts), and biases."""
  f = d_ff or c.d_ff
  into = normal(c.init_std(c.d_model))
  params = {
      'wi': weight(module, 'wi', into, (*leading, c.d_model, f)),
      'wo': weight(module, 'wo', normal(c.init_std(f)), (*leading, f, c.d_model)),
  }
  if c.gated:
    params['gate'] = weight(module, 'gate', into, (*leading, c.d_model, f))
  if not leading and getattr(c, 'ffn_bias', False):
    for name in ('wi', 'gate') if c.gated else ('wi',):
      params[f'{name}_bias'] = weight(module, f'{name}_bias', nn.initializers.zeros, (f,))
    params['wo_bias'] = weight(module, 'wo_bias', nn.initializers.zeros, (c.d_model,))
  return params
