"""Prints the kernels' static schedules for every chip; writes the table that tests hold them to.

Chips of an older table that are not asked for stay in it.

Example:
  python -m experiments.schedules --out tests/kernels_pallas/schedules.json
"""

import pathlib
from typing import Any

from absl import flags

from experiments import flags as common
from experiments import tpu_compiler
from experiments.schedules import compile as compile_lib
from moejax import files
from moejax.errors import UserError

_OUT = flags.DEFINE_string('out', None, 'The JSON file to write; none without it.')
_CHIPS = flags.DEFINE_list('chips', list(compile_lib.CHIPS), 'For which chips.')


def rows(chips: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
  """The table's lines: a case each, of each chip the bundles for 2048 x 512 weights and spills."""
  out = [f'{"bundles for 2048 x 512 weights (spills)":58}' + ''.join(f'{c:>16}' for c in chips)]
  first = next(iter(chips.values()))
  for kernel, cases in first.items():
    for name in cases:
      cells = (chips[chip][kernel][name] for chip in chips)
      figures = (f'{c["a_tile"]} ({c["spills"]})' for c in cells)
      out.append(f'{kernel + ": " + name:58}' + ''.join(f'{f:>16}' for f in figures))
  return out


def main() -> None:
  unknown = set(_CHIPS.value) - set(compile_lib.CHIPS)
  if unknown:
    raise UserError(f'--chips: {sorted(unknown)} unknown; {", ".join(compile_lib.CHIPS)}')
  if _OUT.value:
    files.require_writable(_OUT.value)
  chips = {
      chip: tpu_compiler.run('experiments.schedules.compile', chip, name=chip)
      for chip in _CHIPS.value
  }
  print('\n'.join(rows(chips)))
  if _OUT.value:
    out = pathlib.Path(_OUT.value)
    files.write_json(out, {**(files.read_json(out) if out.is_file() else {}), **chips})


if __name__ == '__main__':
  common.run(main)
