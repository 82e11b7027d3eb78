"""Flags and config files: the nearest name, one line, no traceback."""

import pathlib
import subprocess
import sys

from absl import flags
import pytest

from experiments import flags as common
from moejax import errors


def values():
  made = flags.FlagValues()
  flags.DEFINE_string('workdir', None, 'folder', flag_values=made)
  flags.DEFINE_integer('count', 1, 'number', flag_values=made)
  return made


@pytest.mark.parametrize(
    'argument, message',
    [
        ('--wrkdir=x', r"unknown flag --wrkdir \(did you mean 'workdir'\?\)"),
        ('--count=many', r'count'),
        ('stray', r"unexpected argument 'stray'"),
    ],
)
def test_wrong_flags(argument, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    common.parse_flags(['x', argument], values())
  assert '\n' not in str(caught.value)


def test_right_flags():
  made = values()
  assert common.parse_flags(['x', '--workdir=a', '--count', '3'], made) == ['x']
  assert (made.workdir, made.count) == ('a', 3)


CONFIG = '''
from moejax import config as c

def get_config(variant=''):
  moe = c.EncDecMoeConfig(num_experts=4 if variant == 'small' else 8)
  return c.Experiment(model=c.EncDecConfig(
      vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_heads=2, num_layers=2, num_decoder_layers=2,
      moe=moe))
'''


def test_a_config_file_with_variant_and_overrides(tmp_path):
  file = tmp_path / 'one.py'
  file.write_text(CONFIG)
  load = lambda spec, *settings: common.load_config(spec, settings)
  assert load(str(file)).model.moe.num_experts == 8
  assert load(f'{file}:small').model.moe.num_experts == 4
  assert load(f'{file}:small', 'model.moe.num_experts=2', 'optim.learning_rate=1e-2') == (
      load(str(file), 'model.moe.num_experts=2', 'optim.learning_rate=0.01')
  )
  with pytest.raises(errors.UserError, match=r"'optim\.learning_rat' \(did you mean"):
    load(str(file), 'optim.learning_rat=1')
  with pytest.raises(errors.UserError, match=r'no config file .*on\.py \(did you mean'):
    load(str(tmp_path / 'on.py'))


@pytest.mark.parametrize(
    'source, message',
    [
        ('x = 1', 'has no function get_config'),
        ('x = 1\ndef get_config(:', r'c\.py, line 2: invalid syntax'),
        ('import no_such_module', r"c\.py, line 1: No module named 'no_such_module'"),
        ('def get_config():\n  return Experment()', r"line 2: no name 'Experment'"),
        ('from moejax import config as c\ndef get_config():\n  return c.Experment()',
         r"line 3: .* has no attribute 'Experment' \(did you mean 'Experiment'\?\)"),
        ('from moejax import config as c\nMOE = c.EncDecMoeConfig(\n  num_expert=8)',
         r"line 2: EncDecMoeConfig has no field 'num_expert' \(did you mean 'num_experts'\?\)"),
        ('from moejax.config import *\ndef get_config():\n  return TrainConfig(stepz=3)',
         r"line 3: TrainConfig has no field 'stepz' \(did you mean 'steps'\?\)"),
        ('import dataclasses\nfrom moejax import config as c\nbase = c.TrainConfig()\n'
         'def get_config():\n  return dataclasses.replace(base, log_evry=3)',
         r"line 5: TrainConfig has no field 'log_evry' \(did you mean 'log_every'\?\)"),
        ('import moejax\ndef get_config():\n  return moejax.quantize(dampin=0.1)',
         r"line 3: quantize has no field 'dampin' \(did you mean 'damping'\?\)"),
        ('from moejax import config as c\ndef get_config():\n  return c.EncDecConfig(d_model=3)',
         "line 3: EncDecConfig lacks 'vocab_size', 'd_kv'"),
        ("from moejax import config as c\ndef get_config():\n  return c.TrainConfig(steps='3')",
         "line 3: train.steps: expected int, found '3'"),
        ('from moejax import config as c\nx = c.EncDecMoeConfig(num_experts=0)',
         'line 2: moe.num_experts = 0: at least 1'),
        ('def get_config():\n  return {}["model"]', r"line 2: KeyError: 'model'"),
    ],
)
def test_broken_config_files(tmp_path, source, message):
  (tmp_path / 'c.py').write_text(source)
  with pytest.raises(errors.UserError, match=message) as caught:
    common.load_config(str(tmp_path / 'c.py'))
  assert str(caught.value).startswith(str(tmp_path / 'c.py')) and '\n' not in str(caught.value)


CHAIN = '''
import moejax

def get_config(variant=''):
  first = moejax.quantize(2, layers='encoder/.*')
  return moejax.chain(first, moejax.quantize(layers='decoder/.*')) if variant else first
'''


def test_settings_of_transforms_and_chains(tmp_path):
  file = tmp_path / 'one.py'
  file.write_text(CHAIN)
  one = lambda *changes: common.load_config(str(file), changes)
  two = lambda *changes: common.load_config(f'{file}:two', changes)
  assert one('damping=0.05') == one('matrix.damping=0.05')
  assert one('damping=0.05').matrix.damping == 0.05 and one().matrix.damping == 0.1
  assert one('layers=decoder/.*').layers == 'decoder/.*'
  changed = two('0.bits=3', 'steps.1.matrix.damping=0.2', '1.expert_group=4')
  assert [step.matrix.bits for step in changed.steps] == [3, 'ternary']
  assert [step.matrix.damping for step in changed.steps] == [0.1, 0.2]
  assert [step.expert_group for step in changed.steps] == [16, 4]
  search = one('bits=ternary', 'search.target_bits=0.9').matrix.search
  assert search.target_bits == 0.9
  for load, setting, message in (
      (one, 'dampin=1', r"unknown field 'dampin' \(did you mean 'matrix\.damping'\?\)"),
      (one, 'matrix.dampin=1', r"unknown field 'matrix\.dampin' \(did you mean 'damping'\?\)"),
      (two, 'damping=1', r"'damping' is .* several fields: steps\.0\.matrix\.damping, steps\.1\."),
      (two, '0.dampin=1', r"unknown field '0\.dampin' \(did you mean 'steps\.\d\.matrix\.damping'"),
      (two, '2.bits=2', r"unknown field '2\.bits'"),
      (one, 'bits=7', 'bits = 7: one of'),
      (one, 'damping="much"', r"matrix\.damping: expected float, found 'much'"),
      (one, 'damping=NaN', r"matrix\.damping: expected float, found 'NaN'"),
  ):
    with pytest.raises(errors.UserError, match=message):
      load(setting)


def test_set_needs_settings(tmp_path):
  (tmp_path / 'c.py').write_text('def get_config():\n  return 1\n')
  assert common.load_config(str(tmp_path / 'c.py')) == 1
  with pytest.raises(errors.UserError, match='returns a int, which --set cannot change'):
    common.load_config(str(tmp_path / 'c.py'), ['a=1'])


def test_a_variant_that_does_not_exist(tmp_path):
  (tmp_path / 'c.py').write_text('def get_config():\n  return 1\n')
  with pytest.raises(errors.UserError, match='has no variants'):
    common.load_config(f'{tmp_path / "c.py"}:big')


def test_a_reader_who_goes_away_is_no_error():
  code = 'from experiments import flags\nflags.run(lambda: [print("x" * 999) for _ in range(999)])'
  command = [sys.executable, '-c', code]
  process = subprocess.Popen(
      command, cwd=pathlib.Path(__file__).parents[2], stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, text=True,
  )
  process.stdout.readline()
  process.stdout.close()
  assert process.stderr.read() == ''
  assert process.wait() == 141
