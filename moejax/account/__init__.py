"""What a model costs: stored bytes, parameters, active parameters and FLOPs, from shapes alone.

Everything here reads shapes and dtypes, so abstract params (ShapeDtypeStructs, also inside weight
nodes) do; a model of a trillion parameters is accounted for without allocating it. This is the one
place that counts a model's bytes, and the one that foresees those of weights yet to be compressed.
"""

from moejax.account.counts import (
  Source,
  active_parameters,
  bytes_by_part,
  flops_per_token,
  forward_flops,
  layers,
  nonzeros,
  of_source,
  parameters,
  part_of,
  parts,
  path_flops,
  resident_bytes,
  shapes,
  stored_bits,
  summary,
)
from moejax.account.peak import peak_bytes
from moejax.account.predicted import (
  expected_zero_share,
  low_rank_sparse_node,
  packed_node,
  ternary_bits_per_weight,
  ternary_node,
)
from moejax.account.published import QMOE_PUBLISHED, published_sizes, published_table

__all__ = [
    'QMOE_PUBLISHED',
    'Source',
    'active_parameters',
    'bytes_by_part',
    'expected_zero_share',
    'flops_per_token',
    'forward_flops',
    'layers',
    'low_rank_sparse_node',
    'nonzeros',
    'of_source',
    'packed_node',
    'parameters',
    'part_of',
    'parts',
    'path_flops',
    'peak_bytes',
    'published_sizes',
    'published_table',
    'resident_bytes',
    'shapes',
    'stored_bits',
    'summary',
    'ternary_bits_per_weight',
    'ternary_node',
]
