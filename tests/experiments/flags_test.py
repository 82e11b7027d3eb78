"""Flags and config files: the nearest name, one line, no traceback."""

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
  moe = c.MoeConfig(num_experts=4 if variant == 'small' else 8)
  return c.Experiment(model=c.ModelConfig(
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
        ('def get_config(:', 'cannot be run'),
        ('import no_such_module', "cannot be run: No module named 'no_such_module'"),
    ],
)
def test_broken_config_files(tmp_path, source, message):
  (tmp_path / 'c.py').write_text(source)
  with pytest.raises(errors.UserError, match=message):
    common.load_config(str(tmp_path / 'c.py'))


def test_a_variant_that_does_not_exist(tmp_path):
  (tmp_path / 'c.py').write_text('def get_config():\n  return 1\n')
  with pytest.raises(errors.UserError, match='has no variants'):
    common.load_config(f'{tmp_path / "c.py"}:big')
