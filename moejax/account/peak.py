"""The most memory that a forward pass takes, foreseen by compiling it; nothing is allocated."""

from typing import Any

import jax
import jax.numpy as jnp

from moejax import model, tree
from moejax.config import ModelConfig


def peak_bytes(
    config: ModelConfig, params: Any, batch: int = 1, source: int = 512, target: int = 114,
    dtype: Any = jnp.float32,
) -> int:
  """Bytes of weights, tokens, logits and what the compiler plans beside them, on one device.

  Args:
    params: arrays, nodes or shapes. source, target: tokens of a sample, as in `flops_per_token`.
    dtype: of activations.
  """
  lengths = (source, target) if len(config.stacks) > 1 else (source + target,)
  tokens = [jax.ShapeDtypeStruct((batch, length), jnp.int32) for length in lengths]
  run = jax.jit(lambda p, *own: model.apply_fn(config, p, *own, dtype=dtype).logits_btv)
  planned = run.lower(tree.abstract(params), *tokens).compile().memory_analysis()
  return (
      planned.argument_size_in_bytes + planned.output_size_in_bytes + planned.temp_size_in_bytes
  )
