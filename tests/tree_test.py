import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import tree
from moejax.errors import UserError

PARAMS = {'a': {'wi': np.ones((2, 3), np.float32), 'codes': np.ones(4, np.int8)}, 'b': np.zeros(2)}


def test_flatten_round_trip():
  flat = tree.flatten(PARAMS)
  assert list(flat) == ['a/wi', 'a/codes', 'b']
  assert jax.tree.structure(tree.unflatten(flat)) == jax.tree.structure(PARAMS)


def test_get_names_the_nearest():
  assert tree.get(PARAMS, 'a/wi').shape == (2, 3)
  with pytest.raises(UserError, match="'a/wo'.*did you mean 'a/wi'"):
    tree.get(PARAMS, 'a/wo')


def test_replace_leaves_the_original():
  changed = tree.replace(PARAMS, 'a/wi', 5)
  assert changed['a']['wi'] == 5 and PARAMS['a']['wi'].shape == (2, 3)
  assert changed['a']['codes'] is PARAMS['a']['codes']


def test_first_match_and_no_match():
  assert tree.first_match([('a/.*', 1), ('.*', 2)], 'a/wi') == 1
  assert tree.first_match([('a/.*', 1), ('.*', 2)], 'b') == 2
  with pytest.raises(UserError, match="'b'"):
    tree.first_match([('a/.*', 1)], 'b')


def test_norm_of_all_arrays():
  params = {'a': np.full((2, 3), 2.0, np.float32), 'b': {'c': jnp.bfloat16(5.0)}}
  np.testing.assert_allclose(tree.norm(params), 7.0, rtol=1e-6)
  assert tree.norm({}) == 0.0


def test_cast_floats_spares_codes():
  cast = tree.cast_floats(jax.tree.map(jnp.asarray, PARAMS), jnp.bfloat16)
  assert cast['a']['wi'].dtype == jnp.bfloat16
  assert cast['a']['codes'].dtype == jnp.int8


def test_count():
  assert tree.count(PARAMS) == 6 + 4 + 2


def test_a_rule_that_is_no_pattern_is_named():
  with pytest.raises(UserError, match=r"'\(' is no regular expression: "):
    tree.first_match([('(', 1)], 'a/b')
