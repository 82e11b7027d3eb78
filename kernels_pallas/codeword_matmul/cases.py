"""Shapes that every implementation of the product is checked on, and those worth timing."""

from typing import NamedTuple


class Case(NamedTuple):
  """A matrix rows x cols with this share of zeros, in blocks of block_rows (0: the default)."""

  name: str
  rows: int
  cols: int
  zero_share: float
  block_rows: int = 0


CHECKED: tuple[Case, ...] = (
    Case('one_weight', 1, 1, 0.0),
    Case('one_row', 1, 513, 0.885),
    Case('one_column', 77, 1, 0.6),
    Case('odd', 37, 129, 0.885, 4),
    Case('last_block_short', 21, 64, 0.95, 8),
    Case('dense', 16, 200, 1 / 3, 2),
    Case('all_zero', 16, 300, 1.0),
    Case('very_sparse', 64, 700, 0.995, 16),
)

TIMED: tuple[Case, ...] = (
    Case('switch_base_wi', 3072, 768, 0.857),
    Case('switch_base_wo', 768, 3072, 0.857),
    Case('switch_c_wi', 6144, 2080, 0.886),
    Case('switch_c_wo', 2080, 6144, 0.886),
)
