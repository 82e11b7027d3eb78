"""Shapes that every implementation of chosen experts is checked on."""

from typing import NamedTuple


class Case(NamedTuple):
  """m tokens over e experts d x f; share of pairs chosen at random, and what is special."""

  name: str
  m: int
  e: int
  d: int
  f: int
  share: float
  special: str = ''


CHECKED: tuple[Case, ...] = (
    Case('one_token', 1, 12, 24, 16, 0.25),
    Case('few_tokens', 4, 6, 24, 8, 0.4),
    Case('nothing_chosen', 9, 4, 16, 8, 0.0),
    Case('everything_chosen', 33, 4, 16, 8, 1.0),
    Case('all_on_one', 300, 5, 24, 16, 0.0, 'one'),
    Case('an_idle_token', 70, 8, 24, 16, 0.3, 'idle'),
    Case('tails', 257, 7, 40, 24, 0.2),
    Case('one_expert', 19, 1, 16, 8, 0.5),
    Case('narrow', 64, 32, 16, 1, 0.2),
)
