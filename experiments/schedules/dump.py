"""What the TPU compiler's dump says of a kernel: bundles in all, and slots filled by unit."""

import collections
from collections.abc import Iterable, Sequence
import pathlib
import re
from typing import NamedTuple

_ANALYSIS = 'schedule-analysis_final_bundles'
_UTILIZATION = 'final_hlo-static-per-bundle-utilization'
_BUNDLES = 'final_bundles'
# Address, marker (LB: a loop's first bundle), and a '>' for each loop around it.
_BUNDLE = re.compile(r'\s*(?:0x[0-9a-f]+|0)\s+(\w\w)?\s*:\s*(>*)')


class Schedule(NamedTuple):
  """Bundles of a kernel's body, those without work, and operations by unit (MXU, VALU, ...).

  `loops`: bundles of each loop within a grid step, in order; `bundles` has them once.
  """

  bundles: int
  empty: int
  slots: dict[str, int]
  loops: tuple[int, ...] = ()

  def run(self, trips: Sequence[float]) -> float:
    """Bundles of a grid step whose loops go round so often.

    Raises:
      ValueError: not as many trips as loops.
    """
    return self.bundles + sum((n - 1) * size for n, size in zip(trips, self.loops, strict=True))

  @property
  def spills(self) -> int:
    """Registers written to memory for want of registers, and read again."""
    return self.slots.get('VSTORE:SPILL', 0) + self.slots.get('VLOAD:FILL', 0)


def _slots(text: str) -> dict[str, int]:
  """Sums of the table of one line a bundle; the line under its header says what fits a bundle."""
  units: list[str] = []
  total: collections.Counter[str] = collections.Counter()
  capacity = False
  for line in text.splitlines():
    cells = line.split()
    if line.startswith('MATMUL'):
      units, capacity = [unit.strip() for unit in line.split(',')], True
    elif units and len(cells) == len(units) and all(cell.isdigit() for cell in cells):
      if not capacity:
        total.update(dict(zip(units, map(int, cells))))
      capacity = False
  return {unit: total[unit] for unit in units}


def _loops(text: str) -> tuple[int, ...]:
  """Bundles of the loops inside that over the grid; loops inside those count as theirs."""
  sizes: list[int] = []
  for line in text.splitlines():
    match = _BUNDLE.match(line)
    if match is None or len(match[2]) < 2:
      continue
    if match[1] == 'LB' and len(match[2]) == 2:
      sizes.append(0)
    if sizes:
      sizes[-1] += 1
  return tuple(sizes)


def _count(text: str, kind: str) -> int:
  match = re.search(rf'{kind} scheduled bundles:\s+(\d+)', text)
  if match is None:
    raise ValueError(f'the dump does not say how many {kind} bundles there are')
  return int(match[1])


def schedules(folder: pathlib.Path, files: Iterable[str]) -> dict[str, Schedule]:
  """Kernel name -> schedule, of the kernels whose final dumps are among `files`.

  Raises:
    ValueError: a dump that is not as this reader knows it.
  """
  texts: dict[str, dict[str, str]] = collections.defaultdict(dict)
  for name in files:
    match = re.match(rf'\d+-(.+)-\d+-({_ANALYSIS}|{_UTILIZATION}|{_BUNDLES})\.txt$', name)
    if match and not match[1].startswith(('<', 'TLP')):
      texts[match[1]][match[2]] = (folder / name).read_text()
  return {
      kernel.split('.')[0]: Schedule(
          _count(own[_ANALYSIS], 'total'), _count(own[_ANALYSIS], 'empty'),
          _slots(own.get(_UTILIZATION, '')), _loops(own.get(_BUNDLES, '')),
      )
      for kernel, own in sorted(texts.items()) if 'tpu_custom_call' in own.get(_ANALYSIS, '')
  }
