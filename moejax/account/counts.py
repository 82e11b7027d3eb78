"""Stored bytes, parameters, active parameters and FLOPs of params or of a model folder."""

from collections.abc import Mapping
import functools
import math
from typing import Any, Protocol

import jax
import numpy as np

from moejax import model, tree, weights
from moejax.config import ModelConfig, StackConfig
from moejax.routing.router import DENSE


class Source(Protocol):
  """Leaves by path without their values: `store.Source`, or params in memory."""

  config: ModelConfig

  def paths(self) -> tuple[str, ...]: ...

  def abstract(self, path: str) -> Any: ...


@functools.lru_cache(maxsize=16)
def shapes(config: ModelConfig, dtype: Any = np.float32) -> dict[str, Any]:
  """A model's weights by path, as ShapeDtypeStructs."""
  return tree.flatten(model.abstract_params(config, dtype))


def stored_bits(leaf: Any) -> int:
  """Bits of an array or a weight node, all of the node's metadata counted."""
  if isinstance(leaf, weights.WeightNode):
    return leaf.bits()
  return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize * 8


def resident_bytes(params: Mapping[str, Any]) -> int:
  """Bytes of all arrays as they lie in memory, a node's with their padding."""
  arrays = jax.tree.leaves(params)
  return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in arrays)


def part_of(path: str) -> str:
  """'experts', 'router', 'attention', 'dense_ffn', 'embedding' or 'norms_and_biases'."""
  names = path.split('/')
  if 'experts' in names:
    return 'experts'
  if 'router' in names or names[-1] == 'expert_map':
    return 'router'
  if path == 'shared/embedding' or names[0] == 'lm_head':
    return 'embedding'
  if path == 'shared/positions':
    return 'embedding'
  if names[-1].endswith(('norm', 'bias')) or names[-1] == 'omega':
    return 'norms_and_biases'
  return 'dense_ffn' if 'ffn' in names else 'attention'


def bytes_by_part(params: Mapping[str, Any]) -> dict[str, int]:
  """Stored bytes of each part of the model (`part_of`)."""
  bits: dict[str, int] = {}
  for path, leaf in tree.flatten(params).items():
    bits[part_of(path)] = bits.get(part_of(path), 0) + stored_bits(leaf)
  return {part: -(-n // 8) for part, n in bits.items()}


def experts_a_token(config: ModelConfig, path: str, experts: int) -> int:
  """How many of the experts of a weight's layer compute a token, at most."""
  if config.moe is None or config.moe.router in DENSE:
    return experts
  moe = config.moe
  if moe.selection is not None:
    stack, layer = path.split('/')[:2]
    own = config.of_layer(stack, int(layer.removeprefix('layers_'))).moe
    assert own is not None and own.selection is not None
    return min(own.selection.choices[0], experts)
  return min(moe.top_k, experts)


def _is_map(path: str) -> bool:
  return path.endswith('/expert_map')


def _own(leaf: Any) -> int:
  """Parameters of an array or a node."""
  return leaf.parameters if isinstance(leaf, weights.WeightNode) else math.prod(leaf.shape)


def _met(path: str, leaf: Any, config: ModelConfig) -> int:
  """The parameters of a weight that a token meets."""
  size = 0 if _is_map(path) else _own(leaf)
  if part_of(path) != 'experts':
    return size
  return size // leaf.shape[0] * experts_a_token(config, path, leaf.shape[0])


def parameters(params: Mapping[str, Any]) -> int:
  """Distinct parameters: merged experts once, maps not; a quantized node counts the weights it
  stands for, a factored one its factors (`node.parameters`)."""
  return sum(_own(leaf) for path, leaf in tree.flatten(params).items() if not _is_map(path))


def nonzeros(params: Mapping[str, Any]) -> int:
  """Parameters that are not 0, read from the weights; maps are not counted."""
  return sum(_nonzeros(leaf) for path, leaf in tree.flatten(params).items() if not _is_map(path))


def _nonzeros(leaf: Any) -> int:
  if isinstance(leaf, weights.LowRankSparse):
    return sum(map(_nonzeros, (leaf.left, leaf.right, leaf.kept)))
  if isinstance(leaf, weights.WeightNode):
    node: Any = leaf
    experts = node.shape[0] if len(node.shape) == 3 else 1
    one = lambda i: np.asarray(leaf.expert(i, np.float32))
    return sum(int(np.count_nonzero(one(i))) for i in range(experts))
  return int(np.count_nonzero(np.asarray(leaf)))


def active_parameters(params: Mapping[str, Any], config: ModelConfig) -> int:
  """Parameters a token meets: all but the experts it is not sent to."""
  return sum(
      _met(path, leaf, config) for path, leaf in tree.flatten(params).items()
  )


def path_flops(
    path: str, leaf: Any, config: ModelConfig, source: int, target: int
) -> float:
  """Matmul FLOPs of one weight in a forward pass over one sample; see `forward_flops`."""
  size = _met(path, leaf, config)
  if path == 'shared/embedding':
    return 2.0 * size * target if config.tie_embeddings else 0.0
  of_bias = part_of(path) == 'norms_and_biases' or path.endswith('bias')
  if path == 'shared/positions' or of_bias or len(leaf.shape) < 2:
    return 0.0
  of_source = path.startswith('encoder/') or path.endswith(
      ('cross_attention/k', 'cross_attention/v')
  )
  return 2.0 * size * (source if of_source else target)


def forward_flops(config: ModelConfig, source: int, target: int, params: Any = None) -> float:
  """Floating-point operations of one forward pass on a sample of `source` + `target` tokens.

  Two for each weight and token of a matmul, attention scores and mixtures included, those that a
  causal mask hides as well; a token uses its choices of a sparse layer. Look-ups, norms and
  softmaxes are not counted. Compressed weights
  count as the matmul they stand for, factored ones as their factors.

  Args:
    config: the model.
    source, target: encoder and decoder tokens; a decoder reads the latter alone.
    params: the params if their shapes are not the config's own (low rank, fewer experts).
  """
  flat = shapes(config) if params is None else tree.flatten(params)
  total = sum(
      path_flops(path, leaf, config, source, target) for path, leaf in flat.items()
  )
  return total + 4.0 * _attention_pairs(config, source, target)


def _attention_pairs(config: ModelConfig, source: int, target: int) -> int:
  """Pairs of a query and a key, times the width of all heads, over all layers."""
  if isinstance(config, StackConfig):
    seen = sum(
        min(target, config.window_of(i) or target) for i in range(config.num_layers)
    )
    return config.num_heads * config.d_head * target * seen
  pairs = config.num_layers * source**2 + config.num_decoder_layers * (target**2 + target * source)
  return config.num_heads * config.d_kv * pairs


def flops_per_token(
    config: ModelConfig, source: int = 512, target: int = 114, params: Any = None
) -> float:
  """`forward_flops` over all tokens of a sample; the default lengths are T5's span corruption.

  A decoder's samples have as many tokens as both together.
  """
  if isinstance(config, StackConfig):
    source, target = 0, source + target
  return forward_flops(config, source, target, params) / (source + target)


def summary(
    params: Mapping[str, Any], config: ModelConfig, *, source: int = 512, target: int = 114
) -> dict[str, Any]:
  """The model's account as a report has it: bytes, parameters, active parameters, FLOPs a token.

  Non-zeros are not in it (`nonzeros` reads the weights), nor what a pass takes (`peak_bytes`); what
  a step's work takes is its report's peak_host_bytes.
  """
  flat = tree.flatten(params)
  expert = {path: leaf for path, leaf in flat.items() if part_of(path) == 'experts'}
  expert_bits = sum(stored_bits(leaf) for leaf in expert.values())
  expert_weights = sum(math.prod(leaf.shape) for leaf in expert.values())
  parts = bytes_by_part(params)
  return {
      'stored_bytes': sum(parts.values()),
      'resident_bytes': resident_bytes(params),
      'expert_bytes': parts.get('experts', 0),
      'bytes_by_part': parts,
      'parameters': parameters(params),
      'expert_parameters': expert_weights,
      'active_parameters_per_token': active_parameters(params, config),
      'flops_per_token': flops_per_token(config, source, target, params),
      'expert_bits_per_weight': expert_bits / expert_weights if expert_weights else 0.0,
  }


def of_source(source: Source) -> dict[str, Any]:
  """`summary` of a model folder (`store.Source`) or another source; no weight is read."""
  flat = {path: source.abstract(path) for path in source.paths()}
  return summary(tree.unflatten(flat), source.config)


def layers(
    params: Mapping[str, Any], config: ModelConfig, *, source: int = 512, target: int = 114
) -> list[dict[str, Any]]:
  """One row for each layer (and 'shared', 'lm_head', the stacks' own weights), in model order.

  FLOPs are those of the layer's matmuls over one sample; attention scores are left out. Non-zeros
  are counted where a row's weights have values, else None.
  """

  def layer_of(path: str) -> str:
    names = path.split('/')
    of_stack = len(names) > 1 and names[1].startswith('layers_')
    return '/'.join(names[:2]) if of_stack else names[0]

  return _rows(params, config, layer_of, source, target)


def parts(
    params: Mapping[str, Any], config: ModelConfig, *, source: int = 512, target: int = 114
) -> list[dict[str, Any]]:
  """`layers`, but a row for each part of the model (`part_of`)."""
  return _rows(params, config, part_of, source, target)


def _rows(params, config, name_of, source, target) -> list[dict[str, Any]]:
  rows: dict[str, dict[str, Any]] = {}
  for path, leaf in tree.flatten(params).items():
    row = rows.setdefault(name_of(path), {
        'path': name_of(path), 'sparse': False, 'parameters': 0, 'active_parameters': 0,
        'nonzeros': 0, 'stored_bits': 0, 'resident_bytes': 0, 'expert_bits': 0,
        'expert_parameters': 0, 'flops': 0.0,
    })
    size, bits = math.prod(leaf.shape), stored_bits(leaf)
    met = _met(path, leaf, config)
    expert = part_of(path) == 'experts'
    row['parameters'] += 0 if _is_map(path) else _own(leaf)
    row['active_parameters'] += met
    row['stored_bits'] += bits
    row['resident_bytes'] += resident_bytes({path: leaf})
    row['flops'] += path_flops(path, leaf, config, source, target)
    if tree.is_abstract(leaf):
      row['nonzeros'] = None
    elif row['nonzeros'] is not None and not _is_map(path):
      row['nonzeros'] += _nonzeros(leaf)
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
