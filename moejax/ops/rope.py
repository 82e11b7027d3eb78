"""Rotary positions (arXiv 2104.09864) and their stretched forms: linear, llama3, yarn, longrope."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, width: int, length: int) -> tuple[np.ndarray, float]:
  """Angle of each frequency by position, float32 [width / 2], and the factor on cos and sin.

  Args:
    rope: which kind. width: of a head, the part that rotates.
    length: positions in play; past rope.original_max_positions longrope takes its long factors.
  """
  exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
  plain = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
  if rope.kind == 'linear':
    return plain / np.float32(rope.factor), 1.0
  if rope.kind == 'llama3':
    return _llama3(rope, plain), 1.0
  if rope.kind == 'yarn':
    return _yarn(rope, plain, width)
  if rope.kind == 'longrope':
    return _longrope(rope, plain, length)
  return plain, 1.0


def _longrope(rope: RopeConfig, plain: np.ndarray, length: int) -> tuple[np.ndarray, float]:
  """arXiv 2402.13753; without mscales, sqrt(1 + ln(factor) / ln(trained length)) on both."""
  assert rope.original_max_positions is not None
  far = length > rope.original_max_positions
  factors = np.asarray(rope.long_factor if far else rope.short_factor, np.float32)
  scale = rope.long_mscale if far else rope.short_mscale
  if scale is None:
    scale = rope.attention_factor
  if scale is None:
    grown = math.log(rope.factor) / math.log(rope.original_max_positions)
    scale = math.sqrt(1.0 + grown) if rope.factor > 1 else 1.0
  return plain / factors, float(scale)


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
  """Wavelengths over trained length / low_freq_factor divided by factor, short ones kept."""
  assert rope.original_max_positions is not None
  wavelength = 2 * math.pi / plain
  longest = rope.original_max_positions / rope.low_freq_factor
  shortest = rope.original_max_positions / rope.high_freq_factor
  smooth = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
      rope.high_freq_factor - rope.low_freq_factor
  )
  blended = (1 - smooth) * plain / rope.factor + smooth * plain
  out = np.where(wavelength > longest, plain / rope.factor, plain)
  between = (wavelength >= shortest) & (wavelength <= longest)
  return np.where(between, blended, out).astype(np.float32)


def _yarn(rope: RopeConfig, plain: np.ndarray, width: int) -> tuple[np.ndarray, float]:
  """arXiv 2309.00071, section 3.2: by parts between beta_fast and beta_slow rotations."""
  trained = rope.original_max_positions
  assert trained is not None

  def index_of(rotations: float) -> float:
    turns = trained / (rotations * 2 * math.pi)
    return width * math.log(turns) / (2 * math.log(rope.theta))

  low, high = index_of(rope.beta_fast), index_of(rope.beta_slow)
  if rope.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, width - 1)
  span = max(high - low, 0.001)
  kept = 1 - np.clip((np.arange(width // 2, dtype=np.float32) - low) / span, 0, 1)
  frequencies = plain / np.float32(rope.factor) * (1 - kept) + plain * kept
  return frequencies.astype(np.float32), _yarn_scale(rope)


def _yarn_scale(rope: RopeConfig) -> float:
  grown = lambda m: 0.1 * m * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
  if rope.attention_factor is not None:
    return rope.attention_factor
  if rope.mscale and rope.mscale_all_dim:
    return grown(rope.mscale) / grown(rope.mscale_all_dim)
  return grown(1.0)


def angles(
    rope: RopeConfig, width: int, positions_bt: jax.Array, length: int
) -> tuple[jax.Array, jax.Array]:
  """cos and sin of every position, float32 [b, t, width], the halves alike."""
  frequencies, scale = inverse_frequencies(rope, width, length)
  half = positions_bt.astype(jnp.float32)[..., None] * frequencies.reshape(1, 1, -1)
  # Kept as they are: else XLA takes them anew in each layer, for queries, keys and gradients.
  cos, sin = jax.lax.optimization_barrier((jnp.cos(half) * scale, jnp.sin(half) * scale))
  return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([sin, sin], axis=-1)


def rotate(x_btnh: jax.Array, cos_bth: jax.Array, sin_bth: jax.Array) -> jax.Array:
  """Turns the first part of every head, as wide as cos and sin; halves are the pairs."""
  width = cos_bth.shape[-1]
  turned, rest = x_btnh[..., :width], x_btnh[..., width:]
  swapped = jnp.concatenate([-turned[..., width // 2 :], turned[..., : width // 2]], axis=-1)
  cos, sin = (a[:, :, None, :].astype(x_btnh.dtype) for a in (cos_bth, sin_bth))
  turned = turned * cos + swapped * sin
  return turned if rest.shape[-1] == 0 else jnp.concatenate([turned, rest], axis=-1)
