"""The methods that are compared, and the page of what came out."""

from collections.abc import Callable, Mapping, Sequence
import os
import pathlib
from typing import Any

from experiments import pages
from moejax.compress import hc_smoe, ream, uncurl
from moejax.compress.merge import merge
from moejax.compress.prune import prune

# What of a run is told, and how a page calls it.
KINDS = {
    'loss': 'loss, one shot', 'recovered': 'loss, after recovery', 'accuracy': 'accuracy, one shot',
    'recovered_accuracy': 'accuracy, after recovery',
}
# Name -> a step from the number of experts and a seed. What is random comes first in the table.
METHODS: dict[str, Callable[[int, int], Any]] = {
    'prune random': lambda n, s: prune('random', experts=n, seed=s),
    'prune reap': lambda n, s: prune('reap', experts=n),
    'prune ean': lambda n, s: prune('ean', experts=n),
    'prune frequency': lambda n, s: prune('frequency', experts=n),
    'prune soft_frequency': lambda n, s: prune('soft_frequency', experts=n),
    'prune naee': lambda n, s: prune('naee', experts=n),
    'prune aimer': lambda n, s: prune('aimer', experts=n),
    'merge random': lambda n, s: merge(n, budget='uniform', grouping='random', seed=s),
    'merge msmoe': lambda n, s: merge(n),
    'merge msmoe uniform': lambda n, s: merge(n, budget='uniform'),
    'merge msmoe not aligned': lambda n, s: merge(n, alignment='none'),
    'merge hc_smoe': lambda n, s: hc_smoe(n),
    'merge ream': lambda n, s: ream(n),
    'merge zipit': lambda n, s: merge(n, budget='uniform', operator='zipit'),
    'merge uncurl': lambda n, s: uncurl(n, seed=s),
    'merge mergemoe': lambda n, s: merge(n, operator='least_squares'),
}


def losses(
    result: Mapping[str, Any], kind: str = 'loss'
) -> dict[str, dict[int, list[float]]]:
  """Loss of every seed by method and number of experts; of KINDS."""
  found: dict[str, dict[int, list[float]]] = {}
  for key, run in sorted(result['runs'].items()):
    method, count, _ = key.rsplit('/', 2)
    if kind in run:
      found.setdefault(method, {}).setdefault(int(count), []).append(run[kind])
  return {name: found[name] for name in METHODS if name in found}


def table(result: Mapping[str, Any], kind: str = 'loss') -> str:
  found = losses(result, kind)
  counts = sorted({n for own in found.values() for n in own}, reverse=True)
  lines = ['| method | ' + ' | '.join(f'{n} experts' for n in counts) + ' |',
           '|---|' + '---|' * len(counts)]
  for name, own in found.items():
    lines.append(f'| {name} | ' + ' | '.join(
        pages.spread(own[n]) if n in own else '' for n in counts
    ) + ' |')
  return '\n'.join(lines)


def write(path: pathlib.Path, result: Mapping[str, Any], images: Sequence[pathlib.Path]) -> None:
  """The page; what stands below its marker is kept."""
  machine, before, how = result['machine'], result['before'], result['how']
  task = f'; fine-tuned to label {how["task"]}' if how['task'] else ''
  accuracy = f', accuracy {before["accuracy"]:.3f}' if 'accuracy' in before else ''
  recovery = (
      f'Recovery is {how["steps"]} steps of {how["size"]} samples at a rate of '
      f'{how["learning_rate"]}, held to the model before by\n`configs/recover.py:full`; the same '
      'samples for every method of a seed.\n'
  )
  parts = [
      '# Fewer experts: what every method costs\n',
      f'Written by `python -m experiments.fewer` on {machine["cpu"]}, {machine["cores"]} cores, '
      f'jax {result["jax"]}.\n`{result["model"]}`{task}: {before["expert_bytes"] / 1e6:.1f} MB of '
      f'experts, loss {before["loss"]:.3f}{accuracy} before; {result["samples"]} calibration '
      'samples;\nloss in nats a target of the test texts, mean and standard deviation over '
      'seeds.\n',
      *([recovery] if how['steps'] else []),
  ]
  for kind, words in KINDS.items():
    if losses(result, kind):
      parts += [f'## {words[0].upper()}{words[1:]}\n', table(result, kind) + '\n']
  parts += [f'![{image.stem}]({os.path.relpath(image, path.parent)})\n' for image in images]
  pages.write(path, '\n'.join(parts))
