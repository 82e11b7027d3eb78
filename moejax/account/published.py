"""QMoE's published checkpoints in our format, from shapes and their published zero shares."""

from typing import Any

import ml_dtypes
import numpy as np

from moejax import presets, tree
from moejax.account import counts, predicted

# QMoE (arXiv 2310.16795), tables 3 and 6, ternary: share of zeros; size of the whole checkpoint in
# GB; bits a weight of the experts, all metadata counted, from its compression rate there.
QMOE_PUBLISHED: dict[str, tuple[float, float, float]] = {
    'switch-base-128': (0.857, 1.27, 16 / 17.06),
    'switch-large-128': (0.864, 3.96, 16 / 18.34),
    'switch-c-2048': (0.886, 158.6, 16 / 20.07),
}


def published_sizes() -> list[dict[str, Any]]:
  """A row for each model of QMOE_PUBLISHED.

  `moejax_gb` takes symbols as independent. Real matrices are not: QMoE's own files are larger than
  its format needs for independent symbols of that share. `moejax_as_published_gb` grows our
  codewords by the same factor (ours, with a table for each matrix, should lose less).
  """
  rows = []
  for name, (share, published_gb, published_rate) in QMOE_PUBLISHED.items():
    config = presets.preset(name)
    flat = counts.shapes(config, np.dtype(ml_dtypes.bfloat16))
    before = counts.summary(tree.unflatten(flat), config)
    size = before['expert_parameters']
    after, code_bits = {}, {}
    for storage in ('moejax', 'qmoe_v1'):
      nodes: dict[str, Any] = {
          path: predicted.ternary_node(leaf.shape, share, storage=storage)
          for path, leaf in flat.items() if counts.part_of(path) == 'experts'
      }
      after[storage] = counts.summary(tree.unflatten({**flat, **nodes}), config)
      code_bits[storage] = sum(counts.stored_bits(node.words) for node in nodes.values())
    ours, v1 = after['moejax'], after['qmoe_v1']['expert_bits_per_weight'] * size
    growth = (published_rate * size - v1) / code_bits['qmoe_v1']
    grown = growth * code_bits['moejax']
    rows.append({
        'model': name,
        'parameters': before['parameters'],
        'zero_share': share,
        'bf16_gb': before['stored_bytes'] / 1e9,
        'qmoe_published_gb': published_gb,
        'qmoe_bits_per_weight': published_rate,
        'moejax_gb': ours['stored_bytes'] / 1e9,
        'moejax_bits_per_weight': ours['expert_bits_per_weight'],
        'moejax_as_published_gb': (ours['stored_bytes'] + grown / 8) / 1e9,
        'moejax_as_published_bits_per_weight': ours['expert_bits_per_weight'] + grown / size,
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
