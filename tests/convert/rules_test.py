"""The rule language: axes both ways, one place for every tensor, errors that name what is wrong."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from moejax import safetensors_io, tree
from moejax.config import EncDecConfig, EncDecMoeConfig
from moejax.convert import checkpoint, folder, rules
from moejax.errors import UserError
from moejax.model import abstract_params

SIZES = {'d': 3, 'n': 2, 'h': 5, 'f': 4, 'e': 6}
TINY = EncDecConfig(
    vocab_size=11, d_model=4, d_kv=3, d_ff=5, num_heads=2, num_layers=3, num_decoder_layers=2,
    moe=EncDecMoeConfig(num_experts=3, decoder_sparse_step=1, router_bias=True),
)
CONFIGS = {
    'switch': TINY,
    'untied': dataclasses.replace(TINY, tie_embeddings=False),
    'gated': dataclasses.replace(TINY, gated=True, activation='gelu_new'),
    'dense': dataclasses.replace(TINY, moe=None),
    't5': dataclasses.replace(TINY, family='t5', moe=None),
    't5_v1_1': dataclasses.replace(TINY, family='t5', moe=None, gated=True, tie_embeddings=False),
}


def one_entry(axes, **kwargs):
  (entry,) = rules.expand([rules.Rule('x.{e}', 'y', axes, **kwargs)], SIZES, {})
  return entry


@pytest.mark.parametrize(
    'axes, equation',
    [
        ('f d -> d f', 'fd->df'), ('(n h) d -> d n h', None), ('d (n h) -> n h d', None),
        ('f d -> e d f', 'fd->df'), ('d -> d', 'd->d'), ('e -> e', 'e->e'),
    ],
)
def test_axes_mean_what_einsum_means_and_come_back(axes, equation):
  entry = one_entry(axes)
  array = np.random.default_rng(0).normal(size=entry.their_shape)
  ours = entry.to_ours(array)
  if equation:
    np.testing.assert_array_equal(ours, np.einsum(equation, array))
  if axes == '(n h) d -> d n h':
    for n in range(2):
      np.testing.assert_array_equal(ours[:, n], array[5 * n : 5 * n + 5].T)
  assert ours.shape == (entry.shape[1:] if entry.stacked else entry.shape)
  np.testing.assert_array_equal(entry.to_theirs(ours), array)


@pytest.mark.parametrize('axes', ['f d', 'f d -> f', 'f d -> d f f', 'f d -> d e f', 'd -> e f d'])
def test_axes_that_say_nothing_sensible_are_refused(axes):
  with pytest.raises(ValueError, match='bad axes'):
    rules.parse_axes(axes)


@settings(deadline=None, max_examples=50)
@given(st.permutations(['a', 'b', 'c', 'd']), st.lists(st.integers(1, 4), min_size=4, max_size=4),
       st.integers(1, 3))
def test_any_permutation_with_a_merged_axis_comes_back(order, lengths, split):
  sizes = dict(zip('abcd', lengths))
  left = ' '.join([*'abcd'[:split], f'({" ".join("abcd"[split:])})'])
  (entry,) = rules.expand([rules.Rule('x', 'y', f'{left} -> {" ".join(order)}')], sizes, {})
  array = np.arange(np.prod(lengths)).reshape(entry.their_shape)
  ours = entry.to_ours(array)
  assert ours.shape == tuple(sizes[letter] for letter in order)
  np.testing.assert_array_equal(entry.to_theirs(ours), array)


@pytest.mark.parametrize('name', CONFIGS)
def test_the_tables_name_every_parameter_of_the_model_and_no_other(name):
  ours = {p: leaf.shape for p, leaf in tree.flatten(abstract_params(CONFIGS[name])).items()}
  table = folder.entries(CONFIGS[name])
  assert {entry.ours: entry.shape for entry in table} == ours
  assert len(table) == len(ours)
  names = [n for entry in table for candidates in entry.names for n in candidates[:1]]
  assert len(names) == len(set(names))


def source(config, tmp_path, change=lambda tensors: None, found=None):
  """A checkpoint of random tensors that fits `config`, changed by `change`."""
  rng = np.random.default_rng(0)
  tensors = {
      name: rng.normal(size=entry.their_shape).astype(np.float32)
      for entry in folder.entries(config, found) for name, *_ in entry.names
  }
  change(tensors)
  safetensors_io.write_folder(tmp_path, iter(tensors.items()))
  return checkpoint.open_folder(tmp_path)


WI = 'encoder.block.1.layer.1.mlp.experts.expert_2.wi.weight'


def match(config, opened):
  return rules.match(folder.entries(config), opened)


def test_every_tensor_is_used_exactly_once(tmp_path):
  opened = source(TINY, tmp_path)
  used = [n for m in match(TINY, opened) for n in (*m.found, *m.copies)]
  assert sorted(used) == sorted(opened.names())


def test_a_missing_tensor_is_named_with_its_shape_and_the_nearest(tmp_path):
  def change(tensors):
    tensors['encoder.block.1.layer.1.mlp.experts.expert_2.wi.wieght'] = tensors.pop(WI)

  with pytest.raises(UserError) as error:
    match(TINY, source(TINY, tmp_path, change))
  text = str(error.value)
  assert f'{WI!r} of shape (5, 4) is missing' in text
  assert "did you mean 'encoder.block.1.layer.1.mlp.experts.expert_2.wi.wieght'" in text
  assert 'found with shape (5, 4)' in text and '\n' not in text


def test_an_extra_tensor_is_named_with_both_shapes(tmp_path):
  name = 'encoder.block.1.layer.1.mlp.experts.expert_3.wi.weight'
  with pytest.raises(UserError) as error:
    match(TINY, source(TINY, tmp_path, lambda t: t.update({name: np.ones((2, 7), np.float32)})))
  text = str(error.value)
  assert f'{name!r} of shape (2, 7) has no place' in text
  assert 'did you mean' in text and 'of shape (5, 4)' in text


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path):
  with pytest.raises(UserError) as error:
    match(TINY, source(TINY, tmp_path, lambda t: t.update({WI: np.ones((4, 5), np.float32)})))
  text = str(error.value)
  assert f'{WI!r} has shape (4, 5), config.json wants (5, 4)' in text
  assert 'encoder/layers_1/ffn/experts/wi (3, 4, 5)' in text


def test_two_names_of_one_tensor_are_refused(tmp_path):
  old = 'encoder.block.0.layer.1.DenseReluDense.wi.weight'
  new = 'encoder.block.0.layer.1.mlp.wi.weight'
  with pytest.raises(UserError, match='two names of one tensor'):
    match(TINY, source(TINY, tmp_path, lambda t: t.update({old: t[new]})))


def test_the_old_name_of_a_tensor_is_read(tmp_path):
  old = 'encoder.block.0.layer.1.DenseReluDense.wi.weight'
  opened = source(
      TINY, tmp_path, lambda t: t.update({old: t.pop('encoder.block.0.layer.1.mlp.wi.weight')})
  )
  found = {m.entry.ours: m.found for m in match(TINY, opened)}
  assert found['encoder/layers_0/ffn/wi'] == (old,)


@pytest.mark.parametrize('keep', ['shared', 'encoder.embed_tokens', 'lm_head'])
def test_a_tied_matrix_is_read_under_any_one_of_its_names(keep, tmp_path):
  opened = source(
      TINY, tmp_path, lambda t: t.update({f'{keep}.weight': t.pop('shared.weight')})
  )
  found = {m.entry.ours: m.found for m in match(TINY, opened)}
  assert found['shared/embedding'] == (f'{keep}.weight',)


def test_tied_copies_must_be_equal(tmp_path):
  def change(tensors):
    tensors['lm_head.weight'] = tensors['shared.weight'] + np.float32(1e-3)

  opened = source(TINY, tmp_path, change)
  (tied,) = (m for m in match(TINY, opened) if m.entry.ours == 'shared/embedding')
  with pytest.raises(UserError, match=r'lm_head\.weight.* differs from .shared\.weight'):
    rules.read(tied, opened).assemble()


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_nan_and_infinity_are_named(bad, dtype, tmp_path):
  def change(tensors):
    tensors[WI] = tensors[WI].astype(jax.numpy.dtype(dtype))
    tensors[WI][-1, -1] = bad

  opened = source(TINY, tmp_path, change)
  (experts,) = (m for m in match(TINY, opened) if WI in m.found)
  with pytest.raises(UserError, match=f'{WI}.* holds NaN or infinite'):
    rules.read(experts, opened).assemble()


def test_a_cast_that_overflows_is_an_error(tmp_path):
  def change(tensors):
    tensors[WI][0, 0] = 1e6

  opened = source(TINY, tmp_path, change)
  (experts,) = (m for m in match(TINY, opened) if WI in m.found)
  assert rules.read(experts, opened, np.dtype(np.float32)).assemble().max() == 1e6
  with pytest.raises(UserError, match=r'reaches 1e\+06, too large for float16'):
    rules.read(experts, opened, np.dtype(np.float16)).assemble()


def test_large_finite_values_are_no_infinity(tmp_path):
  def change(tensors):
    tensors[WI][...] = 3e38

  opened = source(TINY, tmp_path, change)
  (experts,) = (m for m in match(TINY, opened) if WI in m.found)
  assert np.isfinite(rules.read(experts, opened).assemble()).all()
