"""Loss against the share of the neurons that run, as PNG."""

from collections.abc import Mapping
import statistics
from typing import Any

from experiments.moefied import page
from experiments.pages import plots, png


def losses(result: Mapping[str, Any]) -> bytes:
  """A panel for each form and split, a line for each choice, the dense model below."""
  pyplot, found = plots(), page.losses(result)
  forms = [f for f in page.FORMS if any(key[0] == f for key in found)]
  splits = list(dict.fromkeys(key[1] for key in found))
  choices = list(dict.fromkeys(key[2] for key in found))
  figure, panels = pyplot.subplots(
      len(forms), len(splits), figsize=(1.6 + 3.0 * len(splits), 0.6 + 2.9 * len(forms)),
      layout='constrained', sharex=True, sharey=True, squeeze=False,
  )
  colours = dict(zip(choices, map(pyplot.get_cmap('tab10'), range(10))))
  for row, form in zip(panels, forms):
    for axes, split in zip(row, splits):
      axes.axhline(result['loss'], color='black', linewidth=0.8, linestyle=':', label='dense')
      for choice in choices:
        own = found.get((form, split, choice), {})
        shares = sorted(own, key=float)
        axes.plot(
            [100 * float(s) for s in shares], [statistics.fmean(own[s]) for s in shares],
            marker='o', markersize=3, color=colours[choice], label=choice,
            linestyle='--' if choice in ('oracle', 'random') else '-',
        )
      axes.set_title(f'{split}, {page.FORMS[form]}', fontsize=9)
      axes.grid(alpha=0.3)
    row[0].set_ylabel('loss, nats a target')
  for axes in panels[-1]:
    axes.set_xlabel('neurons run, %')
  panels[0][-1].legend(fontsize=7, frameon=False, loc='center left', bbox_to_anchor=(1.0, 0.5))
  return png(figure)
