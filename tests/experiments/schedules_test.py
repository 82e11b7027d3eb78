"""The kernels' schedules: what the compiler makes of them now against the stored table."""

import json
import pathlib
import sys

import pytest

from experiments import tpu_compiler
from experiments.schedules import __main__ as command
from experiments.schedules import compile as compile_lib
from experiments.schedules import dump

pytestmark = pytest.mark.once

STORED = pathlib.Path(__file__).parents[1] / 'kernels_pallas' / 'schedules.json'
# Bundles for 2048 x 512 weights that a kernel may take at most, two-bit words, then codes.
MOST = {
    'v5e': {
        'ternary_matmul': {
            '16 rows, bfloat16, 2 levels': 1050, '16 rows, bfloat16, 1 level': 650,
            '64 rows, bfloat16, 1 level': 1250,
        },
        'subbit_matmul': {
            '16 rows, bfloat16, 2 levels': 3000, '16 rows, bfloat16, 1 level': 2500,
        },
    },
    'v6e': {
        'ternary_matmul': {
            '16 rows, bfloat16, 2 levels': 1000, '16 rows, bfloat16, 1 level': 620,
            '64 rows, bfloat16, 1 level': 760,
        },
        'subbit_matmul': {
            '16 rows, bfloat16, 2 levels': 3000, '16 rows, bfloat16, 1 level': 2500,
        },
    },
}


COMPILER = pytest.mark.skipif(
    not (pathlib.Path(sys.prefix) / 'tpu' / 'libtpu').is_dir(), reason='no TPU compiler'
)


@pytest.mark.long
@COMPILER
@pytest.mark.parametrize('chip', compile_lib.CHIPS)
def test_no_kernel_has_become_slower(chip):
  check(chip)


@COMPILER
def test_no_kernel_has_become_slower_with_few_rows():
  check('v5e', '16 rows, bfloat16, 2 levels')


def check(chip, part=''):
  made = tpu_compiler.run('experiments.schedules.compile', chip, part, name=chip)
  stored = {
      kernel: {name: case for name, case in cases.items() if part in name}
      for kernel, cases in json.loads(STORED.read_text())[chip].items()
  }
  assert {k: set(cases) for k, cases in made.items()} == {k: set(c) for k, c in stored.items()}
  for kernel, cases in made.items():
    for name, schedule in cases.items():
      most = 1.01 * stored[kernel][name]['bundles']
      assert schedule['bundles'] <= most, f'{kernel}, {name}: {schedule}, {most} in the table'


@pytest.mark.parametrize('chip', MOST)
def test_the_table_keeps_what_was_promised(chip):
  stored = json.loads(STORED.read_text())[chip]
  for kernel, cases in MOST[chip].items():
    for name, most in cases.items():
      assert stored[kernel][name]['a_tile'] <= most, f'{kernel}, {name}'


ANALYSIS = 'total scheduled bundles: {}\nempty scheduled bundles: 3\n'
UTILIZATION = 'MATMUL, VALU, VSTORE:SPILL, VLOAD:FILL\n4 4 1 3\n1 2 0 0\nword\n0 4 1 2\n'


def write(folder, kernel, analysis):
  for i, (kind, text) in enumerate([
      ('schedule-analysis_final_bundles', analysis),
      ('final_hlo-static-per-bundle-utilization', UTILIZATION),
  ]):
    (folder / f'1795-{kernel}-{70 + i}-{kind}.txt').write_text(text)


def test_the_dump_is_read(tmp_path):
  write(tmp_path, 'product.1', 'tpu_custom_call\n' + ANALYSIS.format(120))
  write(tmp_path, 'fusion', ANALYSIS.format(7))
  write(tmp_path, '<no-hlo>', 'tpu_custom_call\n' + ANALYSIS.format(9))
  found = dump.schedules(tmp_path, [p.name for p in tmp_path.iterdir()])
  assert found == {'product': dump.Schedule(120, 3, {
      'MATMUL': 1, 'VALU': 6, 'VSTORE:SPILL': 1, 'VLOAD:FILL': 2,
  })}
  assert found['product'].spills == 3


LOOPS = '''
     0x4 LB: > { grid } /* loop header */
     0x5   : > { once }
     0x6 LB: >> { patches }
     0x7   : >> { more }
     0x8 PF: > { between }
     0x9 LB: >> { groups }
     0xa LB: >>> { inner }
     0xb   : > { end }
'''


def test_loops_count_as_often_as_they_go_round(tmp_path):
  write(tmp_path, 'product.1', 'tpu_custom_call\n' + ANALYSIS.format(120))
  (tmp_path / '1795-product.1-72-final_bundles.txt').write_text(LOOPS)
  found = dump.schedules(tmp_path, [p.name for p in tmp_path.iterdir()])['product']
  assert found.loops == (2, 2)
  assert found.run((3, 11)) == 120 + 2 * 2 + 10 * 2
  with pytest.raises(ValueError):
    found.run((3,))


def test_a_dump_of_another_form_is_an_error(tmp_path):
  write(tmp_path, 'product', 'tpu_custom_call\n')
  with pytest.raises(ValueError, match='total'):
    dump.schedules(tmp_path, [p.name for p in tmp_path.iterdir()])


def test_the_table_has_a_line_a_case():
  chips = json.loads(STORED.read_text())
  lines = command.rows(chips)
  assert len(lines) == 1 + sum(map(len, chips['v5e'].values()))
  assert all(chip in lines[0] for chip in compile_lib.CHIPS)
