"""The page and picture of what splitting did to embeddings."""

from collections.abc import Mapping
import os
import pathlib
import statistics
from typing import Any

from experiments import pages
from experiments.moefied.page import FORMS

PAIRS = ('clusters/oracle', 'clusters/mlp', 'coactivation/mlp', 'clusters/cosine')
MODELS = {
    'original': 'the original (GELU)', 'swapped': 'ReLU in its place, not trained',
    'trained': 'ReLU, trained on hidden states', 'teal': 'GELU, half of the units cut (TEAL)',
}
KINDS = {
    'bbc_cosine': 'BBC News, cosine to the original', 'bbc_accuracy': 'BBC News, probe',
    'r8_cosine': 'Reuters R8, cosine to the original', 'r8_accuracy': 'Reuters R8, probe',
}


def values(result: Mapping[str, Any], kind: str) -> dict[tuple[str, str], dict[str, list[float]]]:
  """A figure of every seed by (form, pair) and share."""
  found: dict[tuple[str, str], dict[str, list[float]]] = {}
  for key, run in result['runs'].items():
    split, choice, share, form, _ = key.split('/')
    found.setdefault((form, f'{split}/{choice}'), {}).setdefault(share, []).append(run[kind])
  return found


def draw(result: Mapping[str, Any]) -> bytes:
  """A panel for each figure, a line for each form and pair, over the share that runs."""
  pyplot = pages.plots()
  figure, panels = pyplot.subplots(1, 4, figsize=(15.5, 3.6), layout='constrained', sharex=True)
  colours = dict(zip(PAIRS, map(pyplot.get_cmap('tab10'), range(10))))
  for axes, kind in zip(panels, KINDS):
    dense = result['models'].get('trained', {}).get(kind)
    if dense is not None:
      axes.axhline(dense, color='black', linewidth=0.8, linestyle=':', label='all neurons')
    for (form, pair), own in values(result, kind).items():
      shares = sorted(own, key=float)
      axes.plot(
          [100 * float(s) for s in shares], [statistics.fmean(own[s]) for s in shares],
          '-' if form == 'fitted' else '--', marker='o', markersize=3,
          color=colours.get(pair, 'grey'), label=f'{pair}, {FORMS[form]}',
      )
    axes.set_title(KINDS[kind], fontsize=9)
    axes.set_xlabel('neurons run, %')
    axes.grid(alpha=0.3)
  panels[-1].legend(fontsize=7, frameon=False, loc='center left', bbox_to_anchor=(1.0, 0.5))
  return pages.png(figure)


def table(result: Mapping[str, Any], kind: str) -> str:
  """Means and deviations by form and pair."""
  found = values(result, kind)
  shares = sorted({s for own in found.values() for s in own}, key=float)
  lines = ['| split/choice | | ' + ' | '.join(f'{float(s):.0%}' for s in shares) + ' |',
           '|---|---|' + '---|' * len(shares)]
  for (form, pair), own in found.items():
    cells = ' | '.join(pages.spread(own[s]) if s in own else '' for s in shares)
    lines.append(f'| {pair} | {FORMS[form]} | {cells} |')
  return '\n'.join(lines)


def write(path: pathlib.Path, result: Mapping[str, Any], image: pathlib.Path) -> None:
  """The page; what stands below its marker is kept."""
  machine = result['machine']
  models = ['| model | ' + ' | '.join(KINDS.values()) + ' |', '|---|' + '---|' * len(KINDS)]
  models += [
      f'| {MODELS[name]} | ' + ' | '.join(f'{own[kind]:.3f}' for kind in KINDS) + ' |'
      for name, own in result['models'].items()
  ]
  active = f'; {result["active"]:.0%} of its neurons are active' if 'active' in result else ''
  parts = [
      '# An encoder that runs a share of its neurons\n',
      f'Written by `python -m experiments.embeddings` on {machine["cpu"]}, {machine["cores"]} '
      f'cores, jax {result["jax"]}.\nMiniLM (BERT, 6 layers 384x1536), texts of '
      f'{result["length"]} tokens, {result["train"]} for the probes and {result["test"]} for the '
      f'test\nof each set. The trained ReLU model is split into experts of '
      f'{result["expert_size"]} neurons{active}.\n',
      '## All neurons\n', '\n'.join(models) + '\n',
  ]
  for kind, words in KINDS.items():
    if result['runs']:
      parts += [f'## {words}\n', table(result, kind) + '\n']
  parts.append(f'![embeddings by share]({os.path.relpath(image, path.parent)})\n')
  pages.write(path, '\n'.join(parts))
