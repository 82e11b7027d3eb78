"""Pictures of a dense model's activity: sparsity by layer, neuron rates, masses, expected loss."""

from collections.abc import Mapping
import io
from typing import Any

import numpy as np


def render(result: Mapping[str, Any]) -> bytes:
  """A PNG of what `compress.profile.profile` returns."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  rows, experts = result['layers'], result['experts']
  panels = 4 if result['expected'] else 3
  figure, axes = pyplot.subplots(1, panels, figsize=(4.2 * panels, 3.8), layout='constrained')
  colours = pyplot.get_cmap('viridis')(np.linspace(0, 0.9, len(rows)))
  middle = [row['active'] for row in rows]
  low, high = ([row['percentiles'][name] for row in rows] for name in ('10', '90'))
  axes[0].fill_between(range(len(rows)), low, high, alpha=0.25, label='10th to 90th percentile')
  axes[0].plot(middle, marker='o', label='mean')
  axes[0].plot([row['hoyer'] for row in rows], '--', label='effective (square-Hoyer)')
  axes[0].set_xticks(range(len(rows)), [row['path'].removesuffix('/ffn') for row in rows],
                     rotation=60, ha='right', fontsize=6)
  axes[0].set_title('active neurons of a token', fontsize=9)
  axes[0].legend(fontsize=7, frameon=False)
  for row, colour in zip(rows, colours):
    name = row['path'].removesuffix('/ffn')
    axes[1].plot(np.linspace(0, 1, len(row['rates'])), row['rates'], color=colour, label=name)
    axes[2].plot(np.arange(1, experts + 1) / experts, row['mass'], color=colour)
  axes[1].set_title('how often a neuron is active', fontsize=9)
  axes[1].set_xlabel('neurons, from the least active', fontsize=8)
  if len(rows) <= 16:
    axes[1].legend(fontsize=5, frameon=False)
  axes[2].set_title('activation in the best experts', fontsize=9)
  axes[2].set_xlabel(f'share of {experts} experts', fontsize=8)
  if result['expected']:
    shares = [float(share) for share in result['expected']]
    axes[3].plot(shares, list(result['expected'].values()), marker='o', label='oracle')
    axes[3].axhline(result['loss'], linestyle='--', color='grey', label='dense')
    axes[3].set_title('loss with a share of the experts', fontsize=9)
    axes[3].set_xlabel('share', fontsize=8)
    axes[3].legend(fontsize=7, frameon=False)
  for own in axes:
    own.grid(alpha=0.3)
    own.tick_params(labelsize=7)
  axes[0].tick_params(axis='x', labelsize=6)
  for own in axes[:3]:
    own.set_ylim(0, 1.02)
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=130)
  pyplot.close(figure)
  return buffer.getvalue()
