"""dry_run(config, transform): the size of the compressed model from shapes alone."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax import tree
from moejax.compress import quantize, size
from moejax.config import ModelConfig
from moejax.errors import UserError
from moejax.model import abstract_params

# What ternary GPTQ leaves at zero in the published models is 0.857 to 0.886 (QMoE, table 3).
PUBLISHED_ZERO_SHARE = 0.885


def dry_run(
    config: ModelConfig, transform: quantize.Quantize, *,
    zero_share: float = PUBLISHED_ZERO_SHARE, dtype: Any = jnp.bfloat16,
) -> dict[str, Any]:
  """Bytes of the model before and after `quantize`, without touching a weight.

  Exact for 2 to 4 bits. Ternary codes depend on the share of zeros; at the right share the size is
  within 1 %, for symbols as independent as GPTQ leaves them.

  Args:
    config: the model's. transform: from `quantize`; its max_error is not foreseen.
    zero_share: expected share of zeros of ternary weights.
    dtype: of the uncompressed weights.

  Returns {'before_bytes', 'after_bytes', 'expert_bytes_before', 'expert_bytes_after',
  'expert_parameters', 'parameters', 'expert_bits_per_weight', 'ratio'}.

  Raises:
    UserError: zero_share is not in (0, 1), or the model has no experts.
  """
  if not 0 < zero_share < 1:
    raise UserError(f'zero_share = {zero_share}: between 0 and 1')
  settings = transform.matrix
  width = 8 * np.dtype(dtype).itemsize
  total = after = expert_before = expert_after = experts = parameters = 0.0
  for path, leaf in tree.flatten(abstract_params(config, dtype)).items():
    count = math.prod(leaf.shape)
    parameters += count
    total += count * width
    layer, found, _ = path.partition('/experts/')
    if not found:
      after += count * width
      continue
    bits = width * 1.0
    if transform.takes(layer):
      _, cols, rows = leaf.shape
      bits = _bits_per_weight(settings, rows, cols, zero_share, width)
    after += bits * count
    expert_before += count * width
    expert_after += bits * count
    experts += count
  if not experts:
    raise UserError(f'the model has no experts ({config.family}): nothing to compress')
  return {
      'before_bytes': round(total / 8), 'after_bytes': round(after / 8),
      'expert_bytes_before': round(expert_before / 8),
      'expert_bytes_after': round(expert_after / 8),
      'expert_parameters': round(experts), 'parameters': round(parameters),
      'expert_bits_per_weight': expert_after / experts, 'ratio': total / after,
  }


def _bits_per_weight(settings, rows: int, cols: int, zero_share: float, width: int) -> float:
  level_bits = {'bfloat16': 16, 'float32': 32, 'weights': width}[settings.level_dtype]
  if settings.storage == 'dense':
    return level_bits
  if settings.bits == 'ternary':
    return float(size.ternary_bits_per_weight(
        zero_share, rows=rows, cols=cols, storage=settings.storage, level_bits=level_bits
    ))
  return size.packed_bits_per_weight(
      int(settings.bits), rows=rows, cols=cols, group_size=settings.group_size,
      level_bits=level_bits,
  )
