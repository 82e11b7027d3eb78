"""Worker: static schedules of the TPU kernels, against reading the same weights as bfloat16.

Nothing is timed: bundles are cycles if nothing stalls; reading goes at the rate of the memory.
"""

from typing import Any

from experiments import tpu_compiler
from experiments.bench import timing
from experiments.schedules import compile as compile_lib

# Bytes a second of memory, and cycles a second (of v6e an assumption).
CHIPS = {'v5e': (819e9, 1.5e9), 'v6e': (1640e9, 1.75e9)}


def reading(chip: str) -> int:
  """Cycles in which a tile of bfloat16 weights is read."""
  rate, clock = CHIPS[chip]
  return round(2 * compile_lib.TILE / rate * clock)


def main(quick: bool) -> list[dict[str, Any]]:
  rows = []
  for chip in list(CHIPS)[: 1 if quick else None]:
    made = tpu_compiler.run('experiments.schedules.compile', chip, name=chip)
    for kernel, cases in made.items():
      for name, schedule in cases.items():
        case = f'{kernel}: {name}'
        rows.append(timing.row(case, chip, 'moejax', [schedule['a_tile']], 'bundles', ours=True))
        rows.append(timing.row(
            case, chip, 'bfloat16 weights read', [reading(chip)], 'bundles', ours=False
        ))
  return rows


if __name__ == '__main__':
  timing.run(main)
