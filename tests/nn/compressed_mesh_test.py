"""A compressed model on meshes: logits as on one device, each device with its experts' codes."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moejax import config as config_lib
from moejax import model, sharding, tree, weights
from moejax.errors import UserError
from moejax.ops import moe
from moejax.routing import switch

E, D, F = 8, 32, 64
QUICK = {'xla_backend_optimization_level': '0'}
CONFIG = config_lib.EncDecConfig(
    vocab_size=61, d_model=D, d_kv=8, d_ff=F, num_heads=4, num_layers=1, num_decoder_layers=1,
    relative_attention_num_buckets=8, relative_attention_max_distance=16,
    moe=config_lib.EncDecMoeConfig(num_experts=E, encoder_sparse_step=1, decoder_sparse_step=1),
)


def node(name: str, rows: int, cols: int, experts: int = E):
  """Random experts [e, cols, rows] of the size of the initial ones."""
  rng = np.random.default_rng(rows)
  levels = (rng.uniform(1, 2, size=(experts, rows, 2)) * [-1, 1] * cols**-0.5).astype(np.float32)
  if name == 'packed':
    symbols = rng.integers(0, 8, size=(experts, rows, cols))
    scale = levels[..., 1] / 4
    return weights.Packed.from_symbols(symbols, scale, np.full_like(scale, 3.5), bits=3)
  shares = rng.uniform(0.3, 0.95, size=experts)
  symbols = np.stack([
      rng.choice(3, size=(rows, cols), p=[z, (1 - z) / 2, (1 - z) / 2]) for z in shares
  ])
  if name != 'mixed':
    made = {'ternary': weights.Ternary, 'block_ternary': weights.BlockTernary}[name]
    return made.from_symbols(symbols, levels)
  dense = (rng.normal(size=(1, cols, rows)) * cols**-0.5).astype(ml_dtypes.bfloat16)
  parts = [
      weights.Ternary.from_symbols(symbols[:4], levels[:4]), node('packed', rows, cols, 2), dense,
      weights.TernaryV1.from_symbols(symbols[7:], levels[7:]),
  ]
  # Shards of two experts: both of one part, none of it, one of each of two parts.
  return weights.Mixed.from_parts(parts, [[3, 0, 1, 7], [5, 2], [6], [4]])


@functools.cache
def compressed():
  """Params with a node of each class, on the host."""
  params = jax.device_get(model.init_params(CONFIG, jax.random.key(0)))
  for path, name, rows, cols in (
      ('encoder/layers_0/ffn/experts/wi', 'ternary', F, D),
      ('encoder/layers_0/ffn/experts/wo', 'mixed', D, F),
      ('decoder/layers_0/ffn/experts/wi', 'packed', F, D),
      ('decoder/layers_0/ffn/experts/wo', 'block_ternary', D, F),
  ):
    params = tree.replace(params, path, node(name, rows, cols))
  return params


def logits(params, mesh=None):
  keys = jax.random.split(jax.random.key(7), 2)
  x, y = (jax.random.randint(key, (8, 6), 2, 61) for key in keys)
  fn = lambda p: model.apply_fn(CONFIG, p, x, y, mesh=mesh).logits_btv
  return np.asarray(jax.jit(fn).lower(params).compile(compiler_options=QUICK)(params))


@functools.cache
def without_mesh():
  return logits(compressed())


def make_mesh(data, expert, tensor):
  return sharding.make_mesh(config_lib.MeshConfig(data=data, expert=expert, tensor=tensor))


@pytest.mark.long
@pytest.mark.parametrize('shape', [(1, 1, 1), (1, 2, 1), (2, 4, 1), (2, 2, 2)])
def test_same_logits_on_every_mesh(shape):
  mesh = make_mesh(*shape)
  placed = sharding.place(compressed(), mesh)
  np.testing.assert_allclose(logits(placed, mesh), without_mesh(), atol=2e-5)
  assert np.ptp(without_mesh()) > 1


@pytest.mark.long
def test_codes_that_are_not_laid_out_serve_as_well():
  mesh = make_mesh(1, 4, 1)
  two = {p: leaf if tree.is_array(leaf) else leaf.sharded(2)
         for p, leaf in tree.flatten(compressed()).items()}
  for params in (compressed(), tree.unflatten(two)):
    np.testing.assert_allclose(logits(params, mesh), without_mesh(), atol=2e-5)


def test_each_device_holds_the_codes_of_its_experts():
  mesh = make_mesh(1, 4, 1)
  placed = sharding.place(compressed(), mesh)
  held = lambda array: array.addressable_shards[0].data.nbytes
  ternary = placed['encoder']['layers_0']['ffn']['experts']['wi']
  whole = compressed()['encoder']['layers_0']['ffn']['experts']['wi']
  own = [int(o[-1] - o[0]) for o in np.asarray(whole.offsets).astype(np.int64)]
  pairs = [2 * (own[i] + own[i + 1]) for i in range(0, E, 2)]
  assert held(ternary.words) == max(pairs) < whole.words.nbytes / 2
  for name in ('offsets', 'design', 'levels'):
    assert held(getattr(ternary, name)) == getattr(whole, name).nbytes // 4
  # Of each part as many experts as the device with most of them: two ternary, one of the others.
  mixed = placed['encoder']['layers_0']['ffn']['experts']['wo']
  assert [p.shape[0] for p in mixed.parts] == [8, 4, 4, 4]
  assert held(mixed.parts[0].levels) == 2 * D * 2 * 2
  assert held(mixed.parts[2]) == D * F * 2
  # Of its experts alone.
  blocks = placed['decoder']['layers_0']['ffn']['experts']['wo']
  assert held(blocks.words) == blocks.words.nbytes // 4
  assert held(blocks.levels) == blocks.levels.nbytes // 4


def test_a_placed_model_is_stored_whole_and_loads_onto_a_mesh(tmp_path):
  mesh = make_mesh(1, 4, 1)
  model.Model(CONFIG, sharding.place(compressed(), mesh)).save(tmp_path / 'placed')
  model.Model(CONFIG, compressed()).save(tmp_path / 'whole')
  again = model.Model.load(tmp_path / 'placed')
  for a, b in zip(
      jax.tree.leaves(again), jax.tree.leaves(model.Model.load(tmp_path / 'whole')), strict=True
  ):
    assert a.shape == b.shape
  on_mesh = model.Model.load(tmp_path / 'placed', mesh=mesh)
  words = on_mesh.params['encoder']['layers_0']['ffn']['experts']['wi'].words
  assert words.addressable_shards[0].data.shape == (1, words.shape[1])
  np.testing.assert_allclose(logits(on_mesh.params, mesh), without_mesh(), atol=2e-5)


@pytest.mark.long
def test_gradients_in_the_levels_are_those_of_one_device():
  experts = {'wi': node('mixed', F, D), 'wo': node('ternary', D, F)}
  keys = jax.random.split(jax.random.key(3), 2)
  x = jax.random.normal(keys[0], (8, 4, D))
  routing = switch.route(jax.random.normal(keys[1], (8, 4, E)))
  leaves, structure = jax.tree.flatten(experts)
  floating = [jnp.issubdtype(a.dtype, jnp.floating) for a in leaves]
  floats = [jnp.asarray(a, jnp.float32) for a, f in zip(leaves, floating) if f]

  def gradients(mesh):
    def loss(floats, x):
      values = iter(floats)
      filled = [next(values) if f else a for a, f in zip(leaves, floating)]
      experts = jax.tree.unflatten(structure, filled)
      return (moe.moe_ffn(experts, x, routing, 'relu', mesh=mesh)[0] ** 2).sum()

    jitted = jax.jit(jax.grad(loss, (0, 1)))
    return jitted.lower(floats, x).compile(compiler_options=QUICK)(floats, x)

  want, got = gradients(None), gradients(make_mesh(2, 2, 2))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-9)


def test_experts_that_do_not_divide_are_named():
  params = compressed()
  with pytest.raises(UserError, match='8 experts do not divide over mesh axis expert = 3'):
    model.apply_fn(
        CONFIG, sharding.place(params, make_mesh(1, 3, 1)), np.ones((6, 4), int),
        np.ones((6, 4), int), mesh=make_mesh(1, 3, 1),
    )
