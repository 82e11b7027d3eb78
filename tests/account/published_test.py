"""The table of published models: from shapes alone, smaller than what was published."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import account, presets, tree


@pytest.fixture(scope='module')
def rows():
  return {row['model']: row for row in account.published_sizes()}


@pytest.mark.long
def test_published_models_are_smaller_than_published(rows):
  for row in rows.values():
    assert row['moejax_gb'] < row['moejax_as_published_gb'] < row['qmoe_published_gb']
  large = rows['switch-c-2048']
  assert large['bf16_gb'] == pytest.approx(3142, rel=0.001)
  assert large['moejax_gb'] == pytest.approx(132.2, abs=0.05)
  assert large['moejax_as_published_gb'] == pytest.approx(139.7, abs=0.05)
  flat = account.shapes(presets.preset('switch-c-2048'), np.dtype(jnp.bfloat16))
  assert large['parameters'] == tree.count(flat) == sum(np.prod(a.shape) for a in flat.values())
  assert not jax.live_arrays() or sum(a.nbytes for a in jax.live_arrays()) < 1e9


@pytest.mark.long
def test_published_table_is_one():
  table = account.published_table().splitlines()
  assert len(table) == 5
  assert all(line.count('|') == table[0].count('|') for line in table)
