"""What the experts of a layer did over calibration tokens: sums that add up over batches.

Every function takes a piece of the tokens and returns float32 sums by name; `add` keeps totals in
float64 on the host. Memory is that of the sums, whatever the number of tokens: e^2 for the Gram
matrix of the logits, e d for means of inputs and outputs, e for the rest.
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import UserError

Sums = dict[str, np.ndarray]
RATIO_BINS = 4096


@functools.partial(jax.jit, static_argnames=('dropped_to_first',))
def routing_sums(
    logits_me: jax.Array, choice_mk: jax.Array, gate_mk: jax.Array, mask_m: jax.Array,
    keep_mk: jax.Array | None = None, dropped_to_first: bool = False,
) -> dict[str, jax.Array]:
  """Of the routers alone: who is chosen, how strongly, and whose logits agree.

  Args:
    logits_me: before any masking. choice_mk, gate_mk: the routing's. mask_m: False for padding.
    keep_mk, dropped_to_first: count a choice that capacity drops for expert 0, as MC-SMoE's
      published code does; without, capacity does not matter.

  Returns:
    tokens [e]: choices of each expert. gate [e]: their gates. probability [e]: softmax of the
    logits, summed over all tokens. gram [e, e]: H^T H.
  """
  experts = logits_me.shape[1]
  mask, h = mask_m.astype(jnp.float32), logits_me.astype(jnp.float32)
  if dropped_to_first:
    assert keep_mk is not None, 'what capacity drops is in keep_mk'
    choice_mk = jnp.where(keep_mk, choice_mk, 0)
  mask_mk = jnp.broadcast_to(mask[:, None], choice_mk.shape)
  by_expert = lambda a_mk: jnp.zeros(experts).at[choice_mk].add(a_mk, mode='drop')
  # A choice of -1 is none, not the last.
  choice_mk = jnp.where(choice_mk < 0, experts, choice_mk)
  masked = h * mask[:, None]
  return {
      'tokens': by_expert(mask_mk),
      'gate': by_expert(mask_mk * gate_mk.astype(jnp.float32)),
      'probability': (jax.nn.softmax(h, axis=-1) * mask[:, None]).sum(0),
      'gram': jnp.einsum('me,mc->ec', masked, masked, precision='highest'),
  }


@functools.partial(jax.jit, static_argnames=('experts',))
def input_sums(
    x_md: jax.Array, choice_mk: jax.Array, mask_m: jax.Array, experts: int
) -> dict[str, jax.Array]:
  """Of what the experts are given: sum, absolute sum and sum of squares by expert, [e, d].

  Args:
    x_md: the layer's normed inputs. experts: how many the layer has.

  Returns:
    input, input_abs, input_square [e, d]; square [d]: of all tokens.
  """
  mask, x = mask_m.astype(jnp.float32), x_md.astype(jnp.float32)
  own_me = jax.nn.one_hot(choice_mk, experts, dtype=jnp.float32).sum(1) * mask[:, None]
  total = lambda a: jnp.einsum('me,md->ed', own_me, a, precision='highest')
  return {
      'input': total(x), 'input_abs': total(jnp.abs(x)), 'input_square': total(x * x),
      'square': (x * x * mask[:, None]).sum(0),
  }


@functools.partial(jax.jit, static_argnames=('experts',))
def output_sums(
    y_md: jax.Array, expert_m: jax.Array, gate_m: jax.Array, mask_m: jax.Array, experts: int
) -> dict[str, jax.Array]:
  """Of what experts give: y_md are outputs of (token, expert) pairs, without their gates.

  Returns:
    norm, square_norm, gate_norm [e]: sums of |y|, |y|^2 and gate * |y| (EAN, MSAN, REAP).
    output, output_square [e, d]: sums of y and y^2.
  """
  own_me = jax.nn.one_hot(expert_m, experts, dtype=jnp.float32)
  own_me = own_me * mask_m.astype(jnp.float32)[:, None]
  y = y_md.astype(jnp.float32)
  square_m = (y * y).sum(1)
  norm_m = jnp.sqrt(square_m)
  by_expert = lambda a_m: (own_me * a_m[:, None]).sum(0)
  total = lambda a: jnp.einsum('me,md->ed', own_me, a, precision='highest')
  return {
      'norm': by_expert(norm_m), 'square_norm': by_expert(square_m),
      'gate_norm': by_expert(norm_m * gate_m.astype(jnp.float32)),
      'output': total(y), 'output_square': total(y * y),
  }


def gate_ratios(gate_mk: np.ndarray) -> np.ndarray:
  """Counts of tokens by their lesser gate over their greater, in equal bins of [0, 1]."""
  gates = np.sort(np.asarray(gate_mk, np.float64), axis=1)
  ratio = gates[:, 0] / np.maximum(gates[:, 1], np.finfo(np.float64).tiny)
  return np.histogram(ratio, RATIO_BINS, (0.0, 1.0))[0].astype(np.float64)


def median_ratio(counts: np.ndarray) -> float:
  """The median of what `gate_ratios` counted, good to half a bin."""
  total = np.cumsum(counts)
  if not len(total) or not total[-1] > 0:
    raise UserError('the statistics have no token with two experts')
  return (int(np.searchsorted(total, total[-1] / 2)) + 0.5) / len(total)


def add(totals: Sums, sums: Mapping[str, Any]) -> Sums:
  """Totals with a piece's sums added, float64."""
  out = dict(totals)
  for name, value in sums.items():
    value = np.asarray(value, np.float64)
    out[name] = out[name] + value if name in out else value
  return out


def usage(sums: Mapping[str, np.ndarray]) -> np.ndarray:
  """Share of the layer's choices each expert has, float64 [e].

  Raises:
    UserError: no token at all was counted.
  """
  tokens = np.asarray(sums['tokens'], np.float64)
  if not tokens.sum() > 0:
    raise UserError('the statistics have no token: every position of the calibration is masked')
  return tokens / tokens.sum()


def mean(sums: Mapping[str, np.ndarray], name: str) -> np.ndarray:
  """Mean over an expert's own tokens, 0 for one that none chose: 'input', 'output', ..."""
  value = np.asarray(sums[name], np.float64)
  tokens = np.maximum(np.asarray(sums['tokens']), 1)
  return value / tokens.reshape(-1, *(1,) * (value.ndim - 1))
