"""What a model costs: stored bytes, parameters, active parameters and FLOPs, from shapes alone.

Everything here reads shapes and dtypes, so abstract params (ShapeDtypeStructs, also inside weight
nodes) do; a model of a trillion parameters is accounted for without allocating it.
"""

from collections.abc import Mapping
import functools
import math
from typing import Any

import ml_dtypes
import numpy as np

from moejax import model, presets, tree, weights
from moejax.codec import qmoe_v1, ternary
from moejax.config import ModelConfig
from moejax.errors import UserError

# QMoE (arXiv 2310.16795), tables 3 and 6, ternary: share of zeros; size of the whole checkpoint in
# GB; bits a weight of the experts, all metadata counted, from its compression rate there.
QMOE_PUBLISHED: dict[str, tuple[float, float, float]] = {
    'switch-base-128': (0.857, 1.27, 16 / 17.06),
    'switch-large-128': (0.864, 3.96, 16 / 18.34),
    'switch-c-2048': (0.886, 158.6, 16 / 20.07),
}


@functools.lru_cache(maxsize=16)
def shapes(config: ModelConfig, dtype: Any = np.float32) -> dict[str, Any]:
  """A model's weights by path, as ShapeDtypeStructs."""
  return tree.flatten(model.abstract_params(config, dtype))


def stored_bits(leaf: Any) -> int:
  """Bits of an array or a weight node, all of the node's metadata counted."""
  if isinstance(leaf, weights.WeightNode):
    return leaf.bits()
  return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize * 8


def part_of(path: str) -> str:
  """'experts', 'router', 'attention', 'dense_ffn', 'embedding' or 'norms_and_biases'."""
  names = path.split('/')
  if 'experts' in names:
    return 'experts'
  if 'router' in names:
    return 'router'
  if path == 'shared/embedding' or names[0] == 'lm_head':
    return 'embedding'
  if names[-1] in ('norm', 'final_norm', 'relative_bias'):
    return 'norms_and_biases'
  return 'dense_ffn' if 'ffn' in names else 'attention'


def bytes_by_part(params: Mapping[str, Any]) -> dict[str, int]:
  """Stored bytes of each part of the model (`part_of`)."""
  bits: dict[str, int] = {}
  for path, leaf in tree.flatten(params).items():
    bits[part_of(path)] = bits.get(part_of(path), 0) + stored_bits(leaf)
  return {part: -(-n // 8) for part, n in bits.items()}


def active_parameters(params: Mapping[str, Any], config: ModelConfig) -> int:
  """Parameters a token meets: all but the experts it is not sent to (one expert is chosen)."""
  total = 0
  for path, leaf in tree.flatten(params).items():
    size = math.prod(leaf.shape)
    total += size // leaf.shape[0] if part_of(path) == 'experts' else size
  return total


def path_flops(
    path: str, shape: tuple[int, ...], config: ModelConfig, source: int, target: int
) -> float:
  """Matmul FLOPs of one weight in a forward pass over one sample; see `forward_flops`."""
  size = math.prod(shape)
  if path == 'shared/embedding':
    return 2.0 * size * target if config.tie_embeddings else 0.0
  if part_of(path) == 'norms_and_biases' or len(shape) < 2:
    return 0.0
  if part_of(path) == 'experts':
    size //= shape[0]
  of_source = path.startswith('encoder/') or path.endswith(
      ('cross_attention/k', 'cross_attention/v')
  )
  return 2.0 * size * (source if of_source else target)


def forward_flops(config: ModelConfig, source: int, target: int, params: Any = None) -> float:
  """Floating-point operations of one forward pass on a sample of `source` + `target` tokens.

  Two for each weight and token of a matmul, attention scores and mixtures included; a token uses
  one expert of a sparse layer. Look-ups, norms and softmaxes are not counted. Compressed weights
  count as the matmul they stand for.

  Args:
    config: the model.
    source, target: encoder and decoder tokens.
    params: the params if their shapes are not the config's own (low rank, fewer experts).
  """
  flat = shapes(config) if params is None else tree.flatten(params)
  total = sum(
      path_flops(path, tuple(leaf.shape), config, source, target) for path, leaf in flat.items()
  )
  pairs = config.num_layers * source**2 + config.num_decoder_layers * (target**2 + target * source)
  return total + 4.0 * config.num_heads * config.d_kv * pairs


def flops_per_token(
    config: ModelConfig, source: int = 512, target: int = 114, params: Any = None
) -> float:
  """`forward_flops` over all tokens of a sample; the default lengths are T5's span corruption."""
  return forward_flops(config, source, target, params) / (source + target)


def summary(
    params: Mapping[str, Any], config: ModelConfig, *, source: int = 512, target: int = 114
) -> dict[str, Any]:
  """The model's account as a report has it: bytes, parameters, active parameters, FLOPs a token."""
  flat = tree.flatten(params)
  expert = {path: leaf for path, leaf in flat.items() if part_of(path) == 'experts'}
  expert_bits = sum(stored_bits(leaf) for leaf in expert.values())
  expert_weights = sum(math.prod(leaf.shape) for leaf in expert.values())
  parts = bytes_by_part(params)
  return {
      'stored_bytes': sum(parts.values()),
      'expert_bytes': parts.get('experts', 0),
      'bytes_by_part': parts,
      'parameters': tree.count(params),
      'expert_parameters': expert_weights,
      'active_parameters_per_token': active_parameters(params, config),
      'flops_per_token': flops_per_token(config, source, target, params),
      'expert_bits_per_weight': expert_bits / expert_weights if expert_weights else 0.0,
  }


def layers(
    params: Mapping[str, Any], config: ModelConfig, *, source: int = 512, target: int = 114
) -> list[dict[str, Any]]:
  """One row for each layer (and 'shared', 'lm_head', the stacks' own weights), in model order.

  FLOPs are those of the layer's matmuls over one sample; attention scores are left out.
  """
  rows: dict[str, dict[str, Any]] = {}
  for path, leaf in tree.flatten(params).items():
    names = path.split('/')
    name = '/'.join(names[:2]) if len(names) > 1 and names[1].startswith('layers_') else names[0]
    row = rows.setdefault(name, {
        'path': name, 'sparse': False, 'parameters': 0, 'active_parameters': 0,
        'stored_bits': 0, 'expert_bits': 0, 'expert_parameters': 0, 'flops': 0.0,
    })
    size, bits = math.prod(leaf.shape), stored_bits(leaf)
    expert = part_of(path) == 'experts'
    row['parameters'] += size
    row['active_parameters'] += size // leaf.shape[0] if expert else size
    row['stored_bits'] += bits
    row['flops'] += path_flops(path, tuple(leaf.shape), config, source, target)
    if expert:
      row['sparse'] = True
      row['expert_bits'] += bits
      row['expert_parameters'] += size
  return [_finish(row) for row in rows.values()]


def _finish(row: dict[str, Any]) -> dict[str, Any]:
  bits, stored, size = row.pop('expert_bits'), row.pop('stored_bits'), row['expert_parameters']
  return {
      **row, 'stored_bytes': -(-stored // 8), 'expert_bytes': -(-bits // 8),
      'expert_bits_per_weight': bits / size if size else 0.0,
  }


def ternary_bits(shape: tuple[int, ...], zero_share: float, *, level_bits: int = 16) -> float:
  """Predicted bits of a `weights.Ternary` [e, d, f] whose symbols are independent."""
  e, d, f = shape
  return e * (ternary.expected_bits(zero_share, rows=f, cols=d) + 2 * level_bits * f)


def ternary_v1_bits(shape: tuple[int, ...], zero_share: float) -> float:
  """The same for QMoE's format with bf16 levels, its payload measured on a random sample."""
  e, d, f = shape
  rows = max(1, min(f, (1 << 19) // d))
  zero = np.random.default_rng(0).random((rows, d)) < zero_share
  signs = np.random.default_rng(1).integers(1, 3, (rows, d))
  codes, _ = qmoe_v1.encode(np.where(zero, 0, signs))
  return e * (16 * codes.size / rows * f + 64 * f + 32)


def predicted(
    config: ModelConfig, zero_share: float | Mapping[str, float], *, dtype: Any = ml_dtypes.bfloat16
) -> dict[str, float]:
  """Size of a model with ternary experts before any weight is touched.

  Args:
    config: the model.
    zero_share: share of zeros of all experts, or one for each expert path.
    dtype: of everything but the experts.

  Returns stored_bytes, expert_bytes, expert_bits_per_weight.

  Raises:
    UserError: a share is not in [0, 1], or an expert path has none.
  """
  other, bits, size = 0, 0.0, 0
  for path, leaf in shapes(config, np.dtype(dtype)).items():
    if part_of(path) != 'experts':
      other += stored_bits(leaf)
      continue
    if isinstance(zero_share, Mapping) and path not in zero_share:
      raise UserError(f'no zero share given for {path}')
    share = zero_share[path] if isinstance(zero_share, Mapping) else zero_share
    if not 0 <= share <= 1:
      raise UserError(f'zero share {share} of {path}: must be between 0 and 1')
    bits += ternary_bits(leaf.shape, float(share))
    size += math.prod(leaf.shape)
  return {
      'stored_bytes': (other + bits) / 8, 'expert_bytes': bits / 8,
      'expert_bits_per_weight': bits / size if size else 0.0,
  }


def published_sizes() -> list[dict[str, Any]]:
  """QMoE's published checkpoints in our format, from shapes and their published zero shares.

  `moejax_gb` takes symbols as independent. Real matrices are not: QMoE's own files are larger than
  its format needs for independent symbols of that share. `moejax_as_published_gb` grows our
  codewords by the same factor (ours, with a table for each matrix, should lose less).
  """
  rows = []
  for name, (share, published_gb, published_rate) in QMOE_PUBLISHED.items():
    config = presets.preset(name)
    flat = shapes(config, np.dtype(ml_dtypes.bfloat16))
    experts = [leaf.shape for path, leaf in flat.items() if part_of(path) == 'experts']
    size = sum(math.prod(s) for s in experts)
    other = sum(stored_bits(leaf) for path, leaf in flat.items() if part_of(path) != 'experts')
    kinds = {s: experts.count(s) for s in experts}
    v1 = sum(n * ternary_v1_bits(s, share) for s, n in kinds.items())
    v1_metadata = sum(n * s[0] * (64 * s[2] + 32) for s, n in kinds.items())
    ours = sum(n * ternary_bits(s, share) for s, n in kinds.items())
    levels = sum(n * s[0] * 32 * s[2] for s, n in kinds.items())
    growth = (published_rate * size - v1_metadata) / (v1 - v1_metadata)
    grown = (ours - levels) * growth + levels
    rows.append({
        'model': name,
        'parameters': size + other // 16,
        'zero_share': share,
        'bf16_gb': (16 * size + other) / 8e9,
        'qmoe_published_gb': published_gb,
        'qmoe_bits_per_weight': published_rate,
        'moejax_gb': (ours + other) / 8e9,
        'moejax_bits_per_weight': ours / size,
        'moejax_as_published_gb': (grown + other) / 8e9,
        'moejax_as_published_bits_per_weight': grown / size,
    })
  return rows


def published_table() -> str:
  """`published_sizes` as a Markdown table."""
  head = (
      '| model | parameters | zeros | bf16 GB | QMoE GB (bits a weight) | '
      'moejax GB, independent symbols | moejax GB, symbols as uneven as QMoE found them |'
  )
  lines = [head, '|---|---|---|---|---|---|---|']
  for r in published_sizes():
    lines.append(
        f'| {r["model"]} | {r["parameters"] / 1e9:,.1f}e9 | {r["zero_share"]:.1%} | '
        f'{r["bf16_gb"]:,.1f} | {r["qmoe_published_gb"]} ({r["qmoe_bits_per_weight"]:.3f}) | '
        f'{r["moejax_gb"]:,.2f} ({r["moejax_bits_per_weight"]:.3f}) | '
        f'{r["moejax_as_published_gb"]:,.2f} ({r["moejax_as_published_bits_per_weight"]:.3f}) |'
    )
  return '\n'.join(lines)
