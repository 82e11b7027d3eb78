import pytest

from moejax import config as config_lib
from moejax import presets
from moejax.errors import UserError


def tiny(**kwargs):
  values = dict(
      vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2, num_decoder_layers=2
  )
  return config_lib.EncDecConfig(**{**values, **kwargs})


def test_json_round_trip_keeps_every_preset():
  for name, preset in presets.PRESETS.items():
    again = config_lib.model_from_json(config_lib.to_json(preset))
    assert again == preset, name


def test_unknown_field_names_the_nearest():
  values = {**config_lib.to_json(tiny()), 'd_modle': 3}
  with pytest.raises(UserError, match="'d_modle'.*did you mean 'd_model'"):
    config_lib.model_from_json(values)


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
    config_lib.model_from_json(values)
  with pytest.raises(UserError, match='num_heads: expected int'):
    config_lib.model_from_json({**config_lib.to_json(tiny()), 'num_heads': '4'})


def test_overrides_reach_nested_fields():
  experiment = config_lib.Experiment(model=tiny(moe=config_lib.EncDecMoeConfig(num_experts=4)))
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


def test_a_short_path_is_enough_where_it_names_one_field():
  experiment = config_lib.Experiment(model=tiny())
  change = lambda *settings: config_lib.apply_overrides(experiment, settings)
  assert change('steps=7') == change('train.steps=7') != experiment
  assert change('moe.num_experts=8').model.moe == config_lib.EncDecMoeConfig(num_experts=8)
  assert change('model.moe={"num_experts": 4}', 'moe.router_bias=true').model.moe == (
      config_lib.EncDecMoeConfig(num_experts=4, router_bias=True)
  )
  assert change('moe.num_experts=8', 'model.moe=null') == experiment
  with pytest.raises(UserError, match=r"'seed' is .* several fields: data\.seed, train\.seed"):
    change('seed=1')
  with pytest.raises(UserError, match=r"unknown field 'stepz' \(did you mean 'train\.steps'\?\)"):
    change('stepz=1')


def test_settings_that_only_fit_together_are_changed_together():
  experiment = config_lib.Experiment(model=tiny(moe=config_lib.EncDecMoeConfig(num_experts=4)))
  changed = config_lib.apply_overrides(experiment, ['model.family=t5', 'model.moe=null'])
  assert changed.model.family == 't5' and changed.model.moe is None
  with pytest.raises(UserError, match='must be null'):
    config_lib.apply_overrides(experiment, ['model.family=t5'])


@pytest.mark.parametrize('make, message', [
    (lambda: tiny(d_model='32'), "model.d_model: expected int, found '32'"),
    (lambda: tiny(dropout_rate=None), 'model.dropout_rate: expected float, found None'),
    (lambda: tiny(moe=config_lib.DataConfig()), 'model.moe: a DataConfig has no place here'),
    (lambda: config_lib.DataConfig(train_files='a.txt'), 'data.train_files: expected a list'),
    (lambda: config_lib.DataConfig(encoder_length=2), 'data.encoder_length = 2: at least 3'),
    (lambda: config_lib.TrainConfig(batch_size=0), 'train.batch_size = 0: at least 1'),
    (lambda: config_lib.TrainConfig(steps=0), 'train.steps = 0: at least 1'),
    (lambda: config_lib.MeshConfig(expert=0), 'mesh.expert = 0: at least 1'),
    (lambda: config_lib.OptimConfig(learning_rate=float('nan')), 'optim.learning_rate = nan'),
    (lambda: config_lib.OptimConfig(weight_decay_rules=(('a',),)), 'expected 2 values, found 1'),
])
def test_types_and_ranges_are_checked_when_made(make, message):
  with pytest.raises(UserError, match=message):
    make()


def test_what_is_made_from_lists_and_integers_can_be_hashed():
  made = config_lib.OptimConfig(weight_decay_rules=[['a', 0]], learning_rate=1)
  assert made.weight_decay_rules == (('a', 0.0),) and type(made.learning_rate) is float
  hash(made)


@pytest.mark.parametrize('layers, step, expected', [
    (4, 2, (1, 3)), (4, 1, (0, 1, 2, 3)), (4, 0, ()), (6, 3, (1, 4)), (1, 2, ()),
])
def test_sparse_layers(layers, step, expected):
  moe = config_lib.EncDecMoeConfig(num_experts=4, encoder_sparse_step=step)
  assert tiny(num_layers=layers, moe=moe).sparse_layers('encoder') == expected
