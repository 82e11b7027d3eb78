"""Rope parameters that are missing or unknown end in one line, in every family that has them."""

import json

import pytest

from moejax import convert
from moejax.errors import UserError

FAMILIES = (
    'phimoe', 'mixtral', 'olmoe', 'qwen2_moe', 'qwen3_moe', 'llama', 'mistral', 'qwen2', 'qwen3'
)
CASES = {
    'linear': ({}, "'factor' is missing, which rope_type = 'linear' needs"),
    'yarn': ({'original_max_position_embeddings': 16}, "'factor' is missing, which rope_type"),
    'llama3': (
        {'factor': 8.0, 'low_freq_factor': 1.0, 'original_max_position_embeddings': 16},
        "'high_freq_factor' is missing, which rope_type = 'llama3' needs",
    ),
    'longrope': (
        {'short_factor': [1.0] * 4}, "'long_factor' is missing, which rope_type = 'longrope' needs"
    ),
    'linaer': ({'factor': 2.0}, "rope_type = 'linaer'"),
    'default': ({'facto': 2.0}, "unknown field 'facto' (did you mean 'factor'?)"),
}


@pytest.mark.parametrize('name', ['rope_parameters', 'rope_scaling'])
@pytest.mark.parametrize('kind', CASES)
@pytest.mark.parametrize('family', FAMILIES)
def test_one_line_names_the_file_and_the_field(family, kind, name, tmp_path):
  given, said = CASES[kind]
  config = {'model_type': family, name: {'rope_type': kind, **given}}
  if name == 'rope_parameters':
    config[name]['rope_theta'] = 1e4
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(UserError) as caught:
    convert.load(tmp_path)
  line = str(caught.value)
  assert f'config.json: {name}: ' in line and said in line and '\n' not in line
