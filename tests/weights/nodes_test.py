"""Weight nodes: the same weights back, exact sizes, damage refused, pytrees that jit."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import ml_dtypes
import numpy as np
import pytest

from moejax import sharding, tree, weights
from moejax.config import MeshConfig
from moejax.errors import UserError

E, ROWS, COLS = 4, 24, 130
SHARES = (0.885, 1.0, 0.5, 0.95)


def ternary_symbols(seed=0):
  rng = np.random.default_rng(seed)
  parts = [rng.choice(3, size=(ROWS, COLS), p=[p, (1 - p) / 2, (1 - p) / 2]) for p in SHARES]
  return np.stack(parts).astype(np.uint8)


def ternary_levels(seed=1):
  size = np.abs(np.random.default_rng(seed).normal(size=(E, ROWS, 2))) + 0.01
  return (size * [-1, 1]).astype(np.float32)


def ternary_values(symbols, levels):
  levels = levels.astype(ml_dtypes.bfloat16).astype(np.float32)
  rows = np.where(symbols == 1, levels[..., :1], np.where(symbols == 2, levels[..., 1:], 0))
  return rows.transpose(0, 2, 1)


def packed(bits, group_size=0, level_dtype=np.float32):
  rng = np.random.default_rng(bits)
  groups = -(-COLS // group_size) if group_size else 1
  symbols = rng.integers(0, 1 << bits, size=(E, ROWS, COLS))
  scale = rng.normal(size=(E, ROWS, groups)).astype(level_dtype)
  zero = rng.integers(0, 1 << bits, size=(E, ROWS, groups)).astype(level_dtype)
  node = weights.Packed.from_symbols(
      symbols, scale, zero, bits=bits, group_size=group_size, level_dtype=level_dtype
  )
  index = np.arange(COLS) // group_size if group_size else np.zeros(COLS, int)
  scale, zero = scale.astype(np.float32)[..., index], zero.astype(np.float32)[..., index]
  return node, (scale * (symbols - zero).astype(np.float32)).transpose(0, 2, 1)


def ternary():
  symbols, levels = ternary_symbols(), ternary_levels()
  return weights.Ternary.from_symbols(symbols, levels), ternary_values(symbols, levels)


def packed_ternary():
  node, values = ternary()
  return weights.PackedTernary.from_node(node), values


def block_ternary():
  node, values = ternary()
  return weights.BlockTernary.from_node(node), values


def ternary_v1():
  symbols, levels = ternary_symbols(), ternary_levels()
  return weights.TernaryV1.from_symbols(symbols, levels), ternary_values(symbols, levels)


def mixed():
  symbols, levels = ternary_symbols(), ternary_levels()
  values = ternary_values(symbols, levels)
  low = weights.Ternary.from_symbols(symbols[[2, 0]], levels[[2, 0]])
  node_3, values_3 = packed(3)
  three = jax.tree.map(lambda a: a[1:2], node_3)
  values[1] = values_3[1]
  plain = values[3:4].astype(ml_dtypes.bfloat16)
  values[3] = plain[0].astype(np.float32)
  return weights.Mixed.from_parts([low, three, plain], [[2, 0], [1], [3]]), values


NODES = {
    'ternary': ternary,
    'ternary_v1': ternary_v1,
    'packed_ternary': packed_ternary,
    'block_ternary': block_ternary,
    'packed_2': lambda: packed(2),
    'packed_3': lambda: packed(3),
    'packed_4_groups': lambda: packed(4, 32, ml_dtypes.bfloat16),
    'mixed': mixed,
}
each_node = pytest.mark.parametrize('make', NODES.values(), ids=NODES.keys())


@each_node
def test_dense_gives_the_weights(make):
  node, values = make()
  assert node.shape == values.shape == (E, COLS, ROWS)
  assert np.array_equal(jax.jit(lambda n: n.dense(jnp.float32))(node), values)
  assert node.dense(jnp.bfloat16).dtype == jnp.bfloat16


@each_node
def test_one_expert_by_a_traced_index(make):
  node, values = make()
  pick = jax.jit(lambda n, i: n.expert(i, jnp.float32))
  for i in range(E):
    assert np.array_equal(pick(node, jnp.int32(i)), values[i])


@each_node
def test_stored_and_read_again(make):
  node, values = make()
  arrays = node.to_arrays()
  assert all(isinstance(a, np.ndarray) and '/' not in name for name, a in arrays.items())
  again = type(node).from_arrays(node.static(), arrays)
  assert jax.tree.structure(again) == jax.tree.structure(node)
  assert np.array_equal(again.dense(jnp.float32), values)


@each_node
def test_bits_are_those_of_the_arrays(make):
  node, _ = make()
  assert node.bits() == 8 * sum(a.nbytes for a in node.to_arrays().values())
  assert node.bits_per_weight() == node.bits() / (E * ROWS * COLS)
  assert tree.abstract({'w': node})['w'].bits() == node.bits()


@each_node
def test_abstract_nodes_keep_their_shape(make):
  node, _ = make()
  abstract = tree.abstract({'w': node})['w']
  assert abstract.shape == node.shape
  again = type(node).from_arrays(
      node.static(),
      {k: jax.ShapeDtypeStruct(a.shape, a.dtype) for k, a in node.to_arrays().items()},
  )
  assert again.shape == node.shape


@each_node
def test_casts_leave_nodes_alone(make):
  node, values = make()
  cast = tree.cast_floats({'w': node, 'b': jnp.ones(3)}, jnp.bfloat16)
  assert cast['b'].dtype == jnp.bfloat16
  assert np.array_equal(cast['w'].dense(jnp.float32), values)


@each_node
def test_placed_on_a_mesh(make):
  node, values = make()
  mesh = sharding.make_mesh(MeshConfig(data=2, expert=2, tensor=1))
  placed = sharding.place({'a': {'w': node}}, mesh)['a']['w']
  assert np.array_equal(placed.dense(jnp.float32), values)
  lines = sharding.describe({'a': {'w': placed}}, mesh)
  assert len(lines) == len(jax.tree.leaves(node)) and all(x.startswith('a/w/') for x in lines)


def whole_fields(specs):
  """The arrays that every device holds whole."""
  flat = jax.tree_util.tree_leaves_with_path(
      specs, is_leaf=lambda s: isinstance(s, PartitionSpec)
  )
  assert all(s in (PartitionSpec('expert'), PartitionSpec()) for _, s in flat)
  return {
      jax.tree_util.keystr(k, simple=True, separator='.')
      for k, s in flat if s == PartitionSpec()
  }


MIXED_PARTS = {
    'parts.0.words', 'parts.0.offsets', 'parts.0.design', 'parts.0.levels',
    'parts.1.words', 'parts.1.scale', 'parts.1.zero', 'parts.2',
}


@pytest.mark.parametrize('make, laid_out, as_stored', [
    (ternary, set(), {'words'}),
    (ternary_v1, {'words'}, {'words'}),
    (lambda: packed(3), set(), set()),
    (mixed, set(), MIXED_PARTS),
], ids=['ternary', 'ternary_v1', 'packed', 'mixed'])
def test_specs_split_what_can_be_cut_by_expert(make, laid_out, as_stored):
  node, _ = make()
  mesh = sharding.make_mesh(MeshConfig(data=2, expert=2, tensor=2))
  assert whole_fields(node.sharded(2).specs(mesh)) == laid_out
  assert whole_fields(node.specs(mesh)) == as_stored
  odd = sharding.make_mesh(MeshConfig(data=1, expert=3, tensor=1))
  assert len(whole_fields(node.specs(odd))) == len(jax.tree.leaves(node))


@pytest.mark.parametrize('node_class', [weights.Ternary, weights.TernaryV1])
def test_a_single_matrix_is_whole_everywhere(node_class):
  node = node_class.from_symbols(ternary_symbols()[2], ternary_levels()[2])
  mesh = sharding.make_mesh(MeshConfig(data=1, expert=2, tensor=1))
  assert len(whole_fields(node.specs(mesh))) == len(jax.tree.leaves(node))
  assert sharding.place_leaf('w', node, mesh).shape == (COLS, ROWS)


@each_node
def test_sharded_by_expert(make):
  node, values = make()
  sharded = node.sharded(2)
  assert np.array_equal(jax.jit(lambda n: n.dense(jnp.float32))(sharded), values)
  arrays = sharded.to_arrays()
  again = type(node).from_arrays(sharded.static(), arrays)
  assert jax.tree.structure(again) == jax.tree.structure(node)
  assert {k: a.shape for k, a in arrays.items()} == {
      k: a.shape for k, a in node.to_arrays().items()
  }


def test_ternary_in_shards():
  node, _ = ternary()
  sharded = node.sharded(2)
  assert sharded.words.shape[0] == 2
  sharded.validate()
  assert np.array_equal(sharded.symbols(), ternary_symbols())
  assert np.array_equal(sharded.sharded(1).words, node.words)
  assert np.array_equal(sharded.sharded(4).symbols(), ternary_symbols())
  with pytest.raises(UserError, match='4 experts do not split into 3'):
    node.sharded(3)
  damaged = dataclasses.replace(sharded, offsets=sharded.offsets + np.uint32(1))
  with pytest.raises(UserError, match='restore the file'):
    damaged.validate()


def test_taken_experts():
  node, _ = ternary()
  taken = node.take([2, 0, 2])
  taken.validate()
  assert taken.words.size < node.words.size and taken.designs != node.designs
  assert np.array_equal(taken.symbols(), ternary_symbols()[[2, 0, 2]])
  node, _ = ternary_v1()
  assert np.array_equal(node.take([3, 1]).symbols(), node.symbols()[[3, 1]])


@pytest.mark.parametrize('make', [ternary, ternary_v1, lambda: packed(3)])
def test_symbols_come_back(make):
  node, _ = make()
  symbols = node.symbols()
  again = (
      type(node).from_symbols(symbols, node.scale, node.zero, bits=3, level_dtype=np.float32)
      if isinstance(node, weights.Packed) else type(node).from_symbols(symbols, node.levels)
  )
  for name, array in node.to_arrays().items():
    assert np.array_equal(getattr(again, name), array), name


@pytest.mark.parametrize('node_class', [weights.Ternary, weights.TernaryV1])
def test_a_single_matrix(node_class):
  symbols, levels = ternary_symbols()[2], ternary_levels()[2]
  node = node_class.from_symbols(symbols, levels)
  assert node.shape == (COLS, ROWS)
  values = ternary_values(symbols[None], levels[None])[0]
  assert np.array_equal(node.dense(jnp.float32), values)
  again = node_class.from_arrays(node.static(), node.to_arrays())
  assert again.shape == (COLS, ROWS)


def test_v1_writes_what_qmoe_writes_for_one_sided_rows():
  symbols, levels = ternary_symbols()[:1], ternary_levels()[:1]
  symbols[symbols == 1] = 0
  node = weights.TernaryV1.from_symbols(symbols, levels)
  values = ternary_values(symbols, levels)
  # Zero is the minimum of such a row: it gets symbol 1 and its level.
  assert (np.asarray(node.levels)[0, :, 0] == 0).all()
  assert (node.symbols() != 0).all()
  assert np.array_equal(node.dense(jnp.float32), values)
  assert node.bits_per_weight() > 8
  assert weights.Ternary.from_symbols(symbols, levels).bits_per_weight() < 1.2


def test_v1_refuses_rows_that_are_not_ternary():
  values = np.array([[[-1.0, 0.5, 1.0, 0.0]]])
  with pytest.raises(UserError, match='more levels than'):
    weights.TernaryV1.from_values(values)


def test_v1_keeps_levels_on_one_side_of_zero():
  symbols = np.array([[[0, 1, 2, 0]]])
  levels = np.array([[[0.5, 1.0]]])
  node = weights.TernaryV1.from_symbols(symbols, levels)
  assert np.array_equal(node.expert(0, jnp.float32)[:, 0], [0, 0.5, 1.0, 0])


def damage(node, field, change):
  arrays = node.to_arrays()
  arrays[field] = change(arrays[field].copy())
  return arrays


def _bump(index, by):
  def change(a):
    a[index] += by
    return a
  return change


DAMAGE = [
    (ternary, 'words', lambda a: a[:, :-4], 'truncated'),
    (ternary, 'words', lambda a: a[:, ::-1].copy(), 'restore the file'),
    (ternary, 'offsets', _bump((1, -1), 10**6), 'truncated'),
    (ternary, 'offsets', lambda a: a[:, :1], r'offsets has shape'),
    (ternary, 'levels', lambda a: a[:2], 'levels has shape'),
    (ternary, 'design', _bump(0, 1), 'designs'),
    (ternary, 'words', lambda a: a.astype(np.int32), 'int32'),
    (ternary_v1, 'words', lambda a: a[:-1], 'restore the file'),
    (ternary_v1, 'row_offsets', _bump((0, 3), 1), 'restore the file'),
    (lambda: packed(3), 'words', lambda a: a[:, :-1], 'words has shape'),
    (packed_ternary, 'words', lambda a: a[:, :-1], 'words has shape'),
    (packed_ternary, 'levels', lambda a: np.repeat(a, 3, 1), '1 or 2'),
    (packed_ternary, 'levels', lambda a: a[..., :-1], 'levels has shape'),
    (block_ternary, 'words', lambda a: a[:, :-8], 'starts reach row'),
    (block_ternary, 'words', lambda a: a[..., :-1], 'words has shape'),
    (block_ternary, 'starts', lambda a: a[:, :0], 'starts has shape'),
    (block_ternary, 'records', _bump((0, 0, 0, 0), 1), 'tiles are not'),
    (block_ternary, 'records', _bump((0, 0, 0, 1), 1 << 24), 'windows past'),
    (block_ternary, 'homes', _bump((2, 0, 3), 1), 'not a permutation'),
    (block_ternary, 'levels', lambda a: a[..., :-1], 'levels has shape'),
    (lambda: packed(3), 'scale', lambda a: a[:, :-1], 'scale has shape'),
    (mixed, 'slot', _bump(0, 1), 'slot'),
    (mixed, 'part', lambda a: a[:-1], 'has'),
]


@pytest.mark.parametrize('make,field,change,message', DAMAGE)
def test_damaged_arrays_are_refused(make, field, change, message):
  node, _ = make()
  with pytest.raises(UserError, match=message):
    type(node).from_arrays(node.static(), damage(node, field, change))


@each_node
def test_missing_arrays_and_fields_are_refused(make):
  node, _ = make()
  arrays = node.to_arrays()
  arrays.pop(next(iter(arrays)))
  with pytest.raises(UserError):
    type(node).from_arrays(node.static(), arrays)


def test_unknown_tables_are_refused():
  node, _ = ternary()
  with pytest.raises(UserError, match='newer moejax'):
    dataclasses.replace(node, designs=(99,)).validate()


@pytest.mark.parametrize('experts', [[[0, 1], [1], [3]], [[0, 1], [5], [3]]])
def test_mixed_needs_each_expert_once(experts):
  node, _ = mixed()
  with pytest.raises(UserError, match='once'):
    weights.Mixed.from_parts(node.parts, experts)


def test_levels_of_a_wrong_shape_are_refused():
  for node_class in (weights.Ternary, weights.TernaryV1):
    with pytest.raises(UserError, match='levels have shape'):
      node_class.from_symbols(ternary_symbols(), ternary_levels()[:, :-1])
