"""Parameter counts of the published models, from shapes alone."""

import pytest

from moejax import model, presets, tree

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


def test_every_preset_has_a_published_count():
  assert set(PUBLISHED_BILLIONS) == set(presets.PRESETS)


@pytest.mark.parametrize('name', PUBLISHED_BILLIONS)
def test_parameter_count(name):
  billions = tree.count(model.abstract_params(presets.preset(name))) / 1e9
  published = PUBLISHED_BILLIONS[name]
  digits = len(str(published).replace('.', '').lstrip('0'))
  assert float(f'{billions:.{digits}g}') == pytest.approx(published, rel=1e-9)
