"""The page of what splitting a dense model cost, by split, choice and share."""

from collections.abc import Mapping
import itertools
import os
import pathlib
import statistics
from typing import Any

from experiments import pages

SPLITS = ('clusters', 'coactivation', 'contiguous', 'random')
# From what should be best to what should be worst.
CHOICES = ('oracle', 'mlp', 'norm', 'cosine', 'euclid', 'random')
ORDER = ('oracle', 'mlp', 'cosine', 'random')
FORMS = {
    'plain': 'as they are', 'fitted': 'output matrices fitted', 'filled': 'means filled in',
}
# So many nats over the dense model's loss count as none.
NO_LOSS = 0.01


def losses(result: Mapping[str, Any]) -> dict[tuple[str, str, str], dict[str, list[float]]]:
  """The loss of every seed by (form, split, choice) and share."""
  found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
  for key, run in result['runs'].items():
    split, choice, share, form, _ = key.split('/')
    found.setdefault((form, split, choice), {}).setdefault(share, []).append(run['loss'])
  place = lambda name, known: known.index(name) if name in known else len(known)
  order = lambda k: (
      place(k[0], tuple(FORMS)), place(k[1], SPLITS), k[1], place(k[2], CHOICES), k[2]
  )
  return {key: found[key] for key in sorted(found, key=order)}


def needed(own: Mapping[str, list[float]], dense: float) -> str:
  """The least share that was run at no loss, as the page says it."""
  fine = [s for s, values in own.items() if statistics.fmean(values) <= dense + NO_LOSS]
  return f'{min(map(float, fine)):.0%}' if fine else 'more'


def table(result: Mapping[str, Any], form: str) -> str:
  """Means and deviations of one form."""
  found = {key[1:]: own for key, own in losses(result).items() if key[0] == form}
  shares = sorted({s for own in found.values() for s in own}, key=float)
  lines = ['| split | choice | ' + ' | '.join(f'{float(s):.0%}' for s in shares)
           + ' | share without loss |', '|---|---|' + '---|' * (len(shares) + 1)]
  for (split, choice), own in found.items():
    cells = ' | '.join(pages.spread(own[s]) if s in own else '' for s in shares)
    lines.append(f'| {split} | {choice} | {cells} | {needed(own, result["loss"])} |')
  return '\n'.join(lines)


def ordering(result: Mapping[str, Any]) -> tuple[list[str], int]:
  """Where the means are not in ORDER, and in how many places all of them were measured."""
  found, wrong, places = losses(result), [], 0
  for form, split in dict.fromkeys(key[:2] for key in found):
    own = {c: found[form, split, c] for c in ORDER if (form, split, c) in found}
    if len(own) < len(ORDER):
      continue
    for share in sorted(set.intersection(*map(set, own.values())), key=float):
      places += 1
      means = {c: statistics.fmean(own[c][share]) for c in ORDER}
      for better, worse in itertools.pairwise(ORDER):
        if means[better] > means[worse]:
          wrong.append(
              f'{split} at {float(share):.0%}, {FORMS[form]}: {better} {means[better]:.3f}, '
              f'{worse} {means[worse]:.3f}'
          )
  return wrong, places


def best(result: Mapping[str, Any], form: str, share: str, count: int = 4) -> list[str]:
  """The pairs of least mean loss, the oracle left out."""
  means = {
      f'{split}/{choice}': statistics.fmean(own[share])
      for (f, split, choice), own in losses(result).items()
      if f == form and choice != 'oracle' and share in own
  }
  return sorted(means, key=means.__getitem__)[:count]


def write(path: pathlib.Path, result: Mapping[str, Any], image: pathlib.Path) -> None:
  """The page; what stands below its marker is kept."""
  machine = result['machine']
  seeds = len({key.rsplit('/', 1)[1] for key in result['runs']})
  parts = [
      '# A dense model that runs a share of its neurons\n',
      f'Written by `python -m experiments.moefied` on {machine["cpu"]}, {machine["cores"]} cores, '
      f'jax {result["jax"]}.\n`{result["model"]}` in experts of {result["expert_size"]} neurons: '
      f'loss {result["loss"]:.3f} before, {result["active"]:.0%} of the\nneurons active; '
      f'{result["samples"]} calibration samples. Loss in nats a target of the test texts, mean and '
      f'standard\ndeviation over {seeds} seed{"s" if seeds > 1 else ""}. The last column is the '
      f'least share that was run within {NO_LOSS} nats\nof the dense model.\n',
  ]
  for form, words in FORMS.items():
    if any(key[0] == form for key in losses(result)):
      parts += [f'## {words[0].upper()}{words[1:]}\n', table(result, form) + '\n']
  wrong, places = ordering(result)
  if places:
    parts.append(
        f'## {", ".join(ORDER)}: in this order?\n\nIn {places} places all four were measured; '
        f'neighbours are the other way round in {len(wrong)}.\n'
    )
    parts += ['\n'.join(f'- {line}' for line in wrong) + '\n'] if wrong else []
  parts.append(f'![loss by share]({os.path.relpath(image, path.parent)})\n')
  pages.write(path, '\n'.join(parts))
