"""What came out, as PNG: loss against bytes, which experts joined which, and their trees."""

from collections.abc import Mapping
import statistics
from typing import Any

import numpy as np

from experiments.fewer import page
from experiments.pages import plots, png

# The methods whose groups are drawn.
MAPPED = ('prune reap', 'prune frequency', 'merge msmoe', 'merge hc_smoe', 'merge ream',
          'merge random')


def losses(result: Mapping[str, Any]) -> bytes:
  """Loss against bytes of experts, a line a method; one shot, and after recovery where there is."""
  pyplot = plots()
  kinds = [kind for kind in ('loss', 'recovered') if page.losses(result, kind)]
  figure, panels = pyplot.subplots(
      1, len(kinds), figsize=(1.5 + 5.5 * len(kinds), 4.6), layout='constrained', sharey=True,
      squeeze=False,
  )
  sizes: dict[tuple[str, int], list[float]] = {}
  for key, run in result['runs'].items():
    method, count, _ = key.rsplit('/', 2)
    sizes.setdefault((method, int(count)), []).append(run['expert_bytes'])
  before = result['before']
  colours = dict(zip(page.METHODS, map(pyplot.get_cmap('tab20'), range(20))))
  for axes, kind in zip(panels[0], kinds):
    for name, own in page.losses(result, kind).items():
      counts = sorted(own)
      x = [statistics.fmean(sizes[name, n]) / 1e6 for n in counts] + [before['expert_bytes'] / 1e6]
      y = [statistics.fmean(own[n]) for n in counts] + [before['loss']]
      dashed = '--' if 'random' in name else '-'
      axes.plot(x, y, dashed, marker='o', markersize=3, color=colours[name], label=name)
    axes.set_xlabel('experts, MB')
    axes.set_title(page.KINDS[kind], fontsize=9)
    axes.grid(alpha=0.3)
  panels[0][0].set_ylabel('loss, nats a target')
  panels[0][-1].legend(
      fontsize=7, frameon=False, loc='center left', bbox_to_anchor=(1.0, 0.5)
  )
  return png(figure)


def layer_map(result: Mapping[str, Any]) -> bytes | None:
  """Which experts became one (a colour a group) or went (white), by layer and method.

  Of the middle size and the first seed; None where no run of it is there.
  """
  counts = sorted({int(key.rsplit('/', 2)[1]) for key in result['runs']})
  count = counts[len(counts) // 2]
  chosen = {
      name: result['runs'][key] for name in MAPPED
      if (key := next((f'{name}/{count}/{s}' for s in range(100)
                       if f'{name}/{count}/{s}' in result['runs']), '')) in result['runs']
  }
  if not chosen or not result.get('experts'):
    return None
  pyplot = plots()
  layers = list(result['experts'])
  figure, panels = pyplot.subplots(
      1, len(layers), figsize=(1.5 + 4.0 * len(layers), 0.8 + 0.32 * len(chosen)),
      layout='constrained', squeeze=False, sharey=True,
  )
  colours = pyplot.get_cmap('tab20')
  for axes, layer in zip(panels[0], layers):
    experts = result['experts'][layer]
    image = np.ones((len(chosen), experts, 3))
    for i, run in enumerate(chosen.values()):
      for expert, group in groups(run, layer).items():
        image[i, expert] = colours(group % 20)[:3]
    axes.imshow(image, aspect='auto')
    axes.set_xticks(range(experts), range(experts), fontsize=6)
    axes.set_yticks(range(len(chosen)), list(chosen), fontsize=7)
    axes.set_xticks(np.arange(experts + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(chosen) + 1) - 0.5, minor=True)
    axes.grid(which='minor', color='white', linewidth=1.5)
    axes.tick_params(which='both', length=0)
    axes.set_title(layer, fontsize=8)
  figure.suptitle(f'{count} experts a layer: one colour became one, white went', fontsize=9)
  return png(figure)


def groups(run: Mapping[str, Any], layer: str) -> dict[int, int]:
  """The group of each expert of a layer that is left in one."""
  found: dict[int, int] = {}
  for row in run['layers']:
    if row['path'] == f'{layer}/experts':
      members = [[e] for e in row['kept']] if 'kept' in row else [row['members']]
      for i, own in enumerate(members):
        found.update(dict.fromkeys(own, i if 'kept' in row else row['expert']))
  return found


def trees(result: Mapping[str, Any]) -> bytes | None:
  """HC-SMoE's trees of mean outputs, a panel a layer; None where they were not measured."""
  from scipy.cluster import hierarchy

  found = result.get('trees')
  if not found:
    return None
  pyplot = plots()
  figure, panels = pyplot.subplots(
      1, len(found), figsize=(1.5 + 4.0 * len(found), 3.0), layout='constrained', squeeze=False
  )
  for axes, (layer, linkage) in zip(panels[0], found.items()):
    hierarchy.dendrogram(np.array(linkage), ax=axes, leaf_font_size=7, color_threshold=0)
    axes.set_title(layer, fontsize=8)
    axes.set_xlabel('expert', fontsize=8)
  panels[0][0].set_ylabel('distance of mean outputs', fontsize=8)
  return png(figure)
