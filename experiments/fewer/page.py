"""The methods that are compared, and the page and the picture of what came out."""

from collections.abc import Callable, Mapping, Sequence
import io
import os
import pathlib
import statistics
from typing import Any

from moejax import files
from moejax.compress import hc_smoe, ream
from moejax.compress.merge import merge
from moejax.compress.prune import prune

MARKER = '<!-- written by hand below -->'
# Name -> a step from the number of experts and a seed. What is random comes first in the table.
METHODS: dict[str, Callable[[int, int], Any]] = {
    'prune random': lambda n, s: prune('random', experts=n, seed=s),
    'prune reap': lambda n, s: prune('reap', experts=n),
    'prune ean': lambda n, s: prune('ean', experts=n),
    'prune frequency': lambda n, s: prune('frequency', experts=n),
    'prune aimer': lambda n, s: prune('aimer', experts=n),
    'merge random': lambda n, s: merge(n, budget='uniform', grouping='random', seed=s),
    'merge msmoe': lambda n, s: merge(n),
    'merge msmoe uniform': lambda n, s: merge(n, budget='uniform'),
    'merge msmoe not aligned': lambda n, s: merge(n, alignment='none'),
    'merge hc_smoe': lambda n, s: hc_smoe(n),
    'merge ream': lambda n, s: ream(n),
    'merge mergemoe': lambda n, s: merge(n, operator='least_squares'),
}


def losses(result: Mapping[str, Any]) -> dict[str, dict[int, list[float]]]:
  """Loss of every seed by method and number of experts."""
  found: dict[str, dict[int, list[float]]] = {}
  for key, run in sorted(result['runs'].items()):
    method, count, _ = key.rsplit('/', 2)
    found.setdefault(method, {}).setdefault(int(count), []).append(run['loss'])
  return {name: found[name] for name in METHODS if name in found}


def spread(values: Sequence[float]) -> str:
  """Mean and, of several, the sample standard deviation."""
  mean = f'{statistics.fmean(values):.3f}'
  return f'{mean} ± {statistics.stdev(values):.3f}' if len(values) > 1 else mean


def table(result: Mapping[str, Any]) -> str:
  found = losses(result)
  counts = sorted({n for own in found.values() for n in own}, reverse=True)
  lines = ['| method | ' + ' | '.join(f'{n} experts' for n in counts) + ' |',
           '|---|' + '---|' * len(counts)]
  for name, own in found.items():
    lines.append(f'| {name} | ' + ' | '.join(
        spread(own[n]) if n in own else '' for n in counts
    ) + ' |')
  return '\n'.join(lines)


def picture(result: Mapping[str, Any]) -> bytes:
  """Loss against bytes of experts, a line a method, as PNG."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(8, 4.6), layout='constrained')
  sizes: dict[tuple[str, int], list[float]] = {}
  for key, run in result['runs'].items():
    method, count, _ = key.rsplit('/', 2)
    sizes.setdefault((method, int(count)), []).append(run['expert_bytes'])
  before = result['before']
  for i, (name, own) in enumerate(losses(result).items()):
    counts = sorted(own)
    x = [statistics.fmean(sizes[name, n]) / 1e6 for n in counts] + [before['expert_bytes'] / 1e6]
    y = [statistics.fmean(own[n]) for n in counts] + [before['loss']]
    dashed = '--' if 'random' in name else '-'
    colour = pyplot.get_cmap('tab20')(i)
    axes.plot(x, y, dashed, marker='o', markersize=3, color=colour, label=name)
  axes.set_xlabel('experts, MB')
  axes.set_ylabel('loss, nats a target')
  axes.grid(alpha=0.3)
  axes.legend(fontsize=7, frameon=False)
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=130)
  pyplot.close(figure)
  return buffer.getvalue()


def write(path: pathlib.Path, result: Mapping[str, Any], image: pathlib.Path) -> None:
  """The page; what stands below its marker is kept."""
  old = path.read_text() if path.exists() else ''
  by_hand = old.partition(MARKER)[2] or '\n'
  machine, before = result['machine'], result['before']
  link = os.path.relpath(image, path.parent)
  text = (
      '# Fewer experts: what every method costs\n\n'
      f'Written by `python -m experiments.fewer` on {machine["cpu"]}, {machine["cores"]} cores, '
      f'jax {result["jax"]}.\n`{result["model"]}`: {before["expert_bytes"] / 1e6:.1f} MB of '
      'experts, '
      f'loss {before["loss"]:.3f} before; one shot, {result["samples"]} calibration samples;\nloss '
      'in nats a target of the test years, mean and standard deviation over seeds.\n\n'
      f'{table(result)}\n\n![Loss against bytes]({link})\n\n{MARKER}{by_hand}'
  )
  files.write_whole(path, text)
