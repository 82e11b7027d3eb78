import pytest

from moejax import config as config_lib
from moejax import presets
from moejax.errors import UserError


def tiny(**kwargs):
  values = dict(
      vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2, num_decoder_layers=2
  )
  return config_lib.ModelConfig(**{**values, **kwargs})


def test_json_round_trip_keeps_every_preset():
  for name, preset in presets.PRESETS.items():
    again = config_lib.from_json(config_lib.ModelConfig, config_lib.to_json(preset))
    assert again == preset, name


def test_unknown_field_names_the_nearest():
  values = {**config_lib.to_json(tiny()), 'd_modle': 3}
  with pytest.raises(UserError, match="'d_modle'.*did you mean 'd_model'"):
    config_lib.from_json(config_lib.ModelConfig, values)


@pytest.mark.parametrize('field, value, words', [
    ('activation', 'rleu', "did you mean 'relu'"),
    ('family', 'swich', "did you mean 'switch'"),
    ('d_model', 0, 'at least 1'),
    ('dropout_rate', 1.0, r'in \[0, 1\)'),
    ('relative_attention_num_buckets', 7, 'even'),
])
def test_bad_values_name_the_field(field, value, words):
  with pytest.raises(UserError, match=f'{field}.*{words}'):
    tiny(**{field: value})


def test_missing_and_ill_typed_fields():
  values = config_lib.to_json(tiny())
  del values['d_ff']
  with pytest.raises(UserError, match="missing field 'd_ff'"):
    config_lib.from_json(config_lib.ModelConfig, values)
  with pytest.raises(UserError, match='num_heads: expected int'):
    config_lib.from_json(config_lib.ModelConfig, {**config_lib.to_json(tiny()), 'num_heads': '4'})


def test_overrides_reach_nested_fields():
  experiment = config_lib.Experiment(model=tiny(moe=config_lib.MoeConfig(num_experts=4)))
  changed = config_lib.apply_overrides(
      experiment, ['model.moe.num_experts=8', 'train.compute_dtype=bfloat16', 'optim.b1=0']
  )
  assert changed.model.moe.num_experts == 8
  assert changed.train.compute_dtype == 'bfloat16'
  assert changed.optim.b1 == 0.0
  with pytest.raises(UserError, match="'train.stps'.*did you mean 'steps'"):
    config_lib.apply_overrides(experiment, ['train.stps=3'])
  with pytest.raises(UserError, match='expected path.to.field=value'):
    config_lib.apply_overrides(experiment, ['train.steps'])


@pytest.mark.parametrize('layers, step, expected', [
    (4, 2, (1, 3)), (4, 1, (0, 1, 2, 3)), (4, 0, ()), (6, 3, (1, 4)), (1, 2, ()),
])
def test_sparse_layers(layers, step, expected):
  moe = config_lib.MoeConfig(num_experts=4, encoder_sparse_step=step)
  assert tiny(num_layers=layers, moe=moe).sparse_layers('encoder') == expected
