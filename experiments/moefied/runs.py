"""What one run of a pair is, and which there are."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.moefied import page
from moejax import errors
from moejax.compress import routers, split_core
from moejax.compress.moefy import moefy


def check(
    pairs: Sequence[str], shares: Sequence[str], forms: Sequence[str], seeds: Sequence[str]
) -> None:
  """Raises UserError for a pair, share, form or seed that is none."""
  for pair in pairs:
    names = pair.split('/')
    for name, known in zip(names, (split_core.SPLITS, tuple(routers.CHOICES))):
      if len(names) != 2 or name not in known:
        raise errors.UserError(
            f'--pairs {pair}: split/choice, of {split_core.SPLITS} and {tuple(routers.CHOICES)}'
            f'{errors.did_you_mean(name, known)}'
        )
  for form in forms:
    if form not in page.FORMS:
      raise errors.UserError(f'--forms {form}: of {", ".join(page.FORMS)}')
  for name, values, kind in (('shares', shares, float), ('seeds', seeds, int)):
    for value in values:
      try:
        kind(value)
      except ValueError as error:
        raise errors.UserError(f'--{name} {value}: numbers') from error


def left(
    done: Mapping[str, Any], pairs: Sequence[str], shares: Sequence[str], forms: Sequence[str],
    seeds: Sequence[str],
) -> list[tuple[str, ...]]:
  """The runs that are wanted and not done: (split, choice, share, form, seed).

  Raises:
    UserError: see `check`.
  """
  check(pairs, shares, forms, seeds)
  keys = [
      (*pair.split('/'), share, form, seed)
      for seed in seeds for form in forms for share in shares for pair in pairs
  ]
  return [key for key in keys if '/'.join(key) not in done]


def step_of(split: str, choice: str, share: float, form: str, seed: int, size: int) -> Any:
  """The transform of one run, with experts of `size` neurons."""
  return moefy(
      expert_size=size, split=split, choice=choice, share=share, seed=seed,
      calibrate=form == 'fitted', fill=form == 'filled',
      shared=share / 2 if split == 'shared' else 0.0,
  )
