"""Parameter counts of the published models, from shapes alone."""

import pytest

from moejax import account, model, presets, tree

# Parameters in billions as published: Switch by arXiv 2101.03961 table 1 and 9 and the model cards,
# T5 by arXiv 1910.10683 section 3.7, T5 v1.1 by its released checkpoints; tied tensors count once.
PUBLISHED_BILLIONS = {
    'switch-base-8': 0.619, 'switch-base-16': 1.07, 'switch-base-32': 1.98, 'switch-base-64': 3.79,
    'switch-base-128': 7.4, 'switch-base-256': 14.7, 'switch-large-128': 26.3,
    'switch-xxl-128': 395, 'switch-c-2048': 1571,
    't5-small': 0.0605, 't5-base': 0.2229, 't5-large': 0.7377, 't5-3b': 2.85, 't5-11b': 11.3,
    't5-v1_1-small': 0.077, 't5-v1_1-base': 0.248, 't5-v1_1-large': 0.783,
    't5-v1_1-xl': 2.85, 't5-v1_1-xxl': 11.1,
}
# Decoders: what the released safetensors count, to the last parameter.
RELEASED = {
    'grin-moe': 41_873_153_344, 'mixtral-8x7b': 46_702_792_704, 'mixtral-8x22b': 140_630_071_296,
    'olmoe-1b-7b': 6_919_161_856, 'qwen1.5-moe-a2.7b': 14_315_784_192,
    'qwen3-30b-a3b': 30_532_122_624, 'qwen3-235b-a22b': 235_093_634_560,
    'llama-2-7b': 6_738_415_616, 'llama-3.1-8b': 8_030_261_248, 'mistral-7b': 7_241_732_096,
    'qwen2-7b': 7_615_616_512, 'qwen3-8b': 8_190_735_360, 'qwen3-0.6b': 596_049_920,
    'opt-125m': 125_239_296, 'opt-1.3b': 1_315_758_080, 'opt-2.7b': 2_651_596_800,
    'opt-6.7b': 6_658_473_984, 'opt-13b': 12_853_473_280, 'opt-30b': 29_974_540_288,
}
ACTIVE = {  # GRIN: arXiv 2409.12136, table 1; Mixtral: arXiv 2401.04088; the others by their names
    'grin-moe': 6_640_999_744, 'mixtral-8x7b': 12_879_925_248,
}


def test_every_preset_has_a_published_count():
  assert {*PUBLISHED_BILLIONS, *RELEASED, 'opt-66b'} == set(presets.PRESETS)


@pytest.mark.long(but=(
    'switch-base-8',
    'switch-c-2048',
    't5-base',
    't5-small',
    't5-v1_1-small',
    't5-11b',
))
@pytest.mark.parametrize('name', PUBLISHED_BILLIONS)
def test_parameter_count(name):
  billions = tree.count(model.abstract_params(presets.preset(name))) / 1e9
  published = PUBLISHED_BILLIONS[name]
  digits = len(str(published).replace('.', '').lstrip('0'))
  assert float(f'{billions:.{digits}g}') == pytest.approx(published, rel=1e-9)


@pytest.mark.parametrize('name', RELEASED)
def test_decoders_count_to_the_last_parameter(name):
  config = presets.preset(name)
  params = model.abstract_params(config)
  assert tree.count(params) == RELEASED[name]
  if name in ACTIVE:
    assert account.active_parameters(params, config) == ACTIVE[name]
