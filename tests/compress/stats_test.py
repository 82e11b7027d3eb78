"""Statistics of a whole model: streamed, masked, resumable, and as MC-SMoE counts them."""

import dataclasses
from pathlib import Path
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import tree
from moejax.compress import compress, gradients, merge, stats
from moejax.errors import UserError
from moejax.nn import decoder

sys.path.insert(0, str(Path(__file__).parent))
import mcsmoe_vectors as vectors
import small_models as small

FAMILIES = tuple(small.CONFIGS)


def routed(model, family, batch):
  """Every layer's routing in a plain forward pass, with what is real."""
  if family == 'switch':
    tokens = batch['encoder_tokens']
    out = model.apply(tokens, batch['decoder_tokens'], encoder_mask=tokens != 0)
    real = {'encoder': tokens != 0, 'decoder': np.ones(batch['targets'].shape, bool)}
  else:
    out = model.apply(batch['tokens'])
    real = {'decoder': np.ones(batch['tokens'].shape, bool)}
  return {p: (r, real[p.split('/')[0]].reshape(-1)) for p, r in out.routings.items()}


def close(found, want, name):
  """Equal but for rounding: sums cancel, so that it goes by the largest; ratios by their bin."""
  if name == 'gate_ratio':
    found, want = (np.repeat(np.arange(len(n)), n.astype(int)) for n in (found, want))
    assert found.shape == want.shape
    assert np.abs(found - want).max(initial=0) <= 1
    return
  atol = 1e-6 * max(np.abs(want).max(), 10.0)
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=atol, err_msg=name)


@pytest.mark.long(but=('mixtral', 'switch'))
@pytest.mark.parametrize('family', FAMILIES)
def test_they_are_those_of_a_plain_forward_pass(family):
  model, batches = small.model(family), small.batches(family)
  found = stats.measure(model, batches, ('routing', 'outputs'), chunk_tokens=30)
  want = {}
  for batch in batches:
    for path, (r, real) in routed(model, family, batch).items():
      chosen = np.asarray(jax.nn.one_hot(r.choice_mk, small.EXPERTS)) * real[:, None, None]
      logits = np.asarray(r.logits_me, np.float64) * real[:, None]
      gate = np.asarray(r.gate_mk) * np.asarray(r.keep_mk)
      sums = want.setdefault(path, {'tokens': 0, 'gate': 0, 'gram': 0})
      sums['tokens'] += (chosen * np.asarray(r.keep_mk)[..., None]).sum((0, 1))
      sums['gate'] += (chosen * gate[..., None]).sum((0, 1))
      sums['gram'] += logits.T @ logits
  assert set(found.layers) == set(want)
  for path, sums in want.items():
    for name, value in sums.items():
      close(found.layers[path][name], value, name)


@pytest.mark.parametrize('family', ('mixtral', 'qwen2_moe', 'olmoe'))
def test_moments_of_a_layer_by_hand(family):
  """The first layer token by token, in float64: REAP's sums, means, moments, hidden units."""
  model, (batch,) = small.model(family), small.batches(family, 1)
  sums = stats.measure(model, [batch], stats.KINDS).layers['decoder/layers_0/ffn']
  routing = model.apply(batch['tokens']).routings['decoder/layers_0/ffn']
  layer, tokens = model.params['decoder']['layers_0'], jnp.asarray(batch['tokens'])
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  context = decoder.make_context(
      model.config, positions, positions, length=tokens.shape[1], valid_bt=tokens >= 0
  )
  x = decoder.embed(model.config, model.params, tokens, positions, jnp.float32, None)
  module = decoder.layer_module(model.config, 0)
  x, _ = module.apply({'params': layer}, x, context, method='attend')
  x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
  x *= np.asarray(layer['ffn']['norm']) / np.sqrt(
      (x**2).mean(1, keepdims=True) + model.config.norm_eps
  )
  w = {name: np.asarray(a, np.float64) for name, a in layer['ffn']['experts'].items()}
  want = {}

  def add(name, e, value):
    want.setdefault(name, np.zeros((small.EXPERTS, *np.shape(value))))[e] += value

  for e in range(small.EXPERTS):
    for m, row in enumerate(x):
      gate = row @ w['gate'][e]
      hidden = gate / (1 + np.exp(-gate)) * (row @ w['wi'][e])
      y = hidden @ w['wo'][e]
      add('output_all', e, y)
      for k in np.flatnonzero(np.asarray(routing.choice_mk[m]) == e):
        size = np.linalg.norm(y)
        for name, value in {
            'tokens': 1, 'input': row, 'input_abs': abs(row), 'input_square': row**2,
            'norm': size, 'square_norm': size**2, 'output': y, 'output_square': y**2,
            'gate_norm': size * float(routing.gate_mk[m, k]), 'hidden_square': hidden**2,
        }.items():
          add(name, e, value)
  for name, value in want.items():
    np.testing.assert_allclose(sums[name], value, rtol=2e-4, atol=2e-4, err_msg=name)


def test_with_every_expert_chosen_both_means_are_one():
  """With every expert chosen (top-6 of 6) outputs over all tokens are those over chosen ones."""
  config = small.CONFIGS['mixtral']
  config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, top_k=6))
  model = dataclasses.replace(small.model('mixtral'), config=config)
  for sums in stats.measure(model, small.batches('mixtral'), stats.KINDS).layers.values():
    np.testing.assert_allclose(sums['output'], sums['output_all'], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(sums['tokens'], sums['tokens_all'])


@pytest.mark.parametrize('chunk', (24, 50, 10_000))
def test_pieces_add_up(chunk):
  model, batches = small.model('qwen2_moe'), small.batches('qwen2_moe')
  whole = stats.measure(model, batches)
  pieces = stats.measure(model, batches, chunk_tokens=chunk)
  for path, sums in whole.layers.items():
    for name, value in sums.items():
      close(pieces.layers[path][name], value, name)


def test_saved_and_loaded(tmp_path):
  found = stats.measure(small.model('grin'), small.batches('grin'))
  found.save(tmp_path / 'stats.npz')
  again = stats.Statistics.load(tmp_path / 'stats.npz')
  assert (again.kinds, again.tokens, again.model) == (found.kinds, found.tokens, found.model)
  for path, sums in found.layers.items():
    for name, value in sums.items():
      np.testing.assert_array_equal(again.layers[path][name], value)
  (tmp_path / 'broken.npz').write_bytes((tmp_path / 'stats.npz').read_bytes()[:99])
  for name, message in (('broken.npz', 'holds no statistics'), ('none.npz', 'does not exist')):
    with pytest.raises(UserError, match=message):
      stats.Statistics.load(tmp_path / name)


def test_a_killed_pass_goes_on(tmp_path, monkeypatch):
  model, batches = small.model('mixtral'), small.batches('mixtral')
  want = stats.measure(model, batches, chunk_tokens=50)
  real, walks = stats.walker.Walk, []

  def walk(*args, **kwargs):
    if len(walks) == 2:
      raise KeyboardInterrupt
    walks.append(1)
    return real(*args, **kwargs)

  monkeypatch.setattr(stats.walker, 'Walk', walk)
  run = lambda: stats.measure(model, batches, chunk_tokens=50, work=tmp_path / 'work.npz')
  with pytest.raises(KeyboardInterrupt):
    run()
  walks.clear()
  got = run()
  assert len(walks) == 2  # Of four pieces.
  for path, sums in want.layers.items():
    for name, value in sums.items():
      np.testing.assert_array_equal(got.layers[path][name], value)


def test_mcsmoe_counts_dropped_choices_and_padding(tmp_path):
  """The published usage and similarity, from the whole model on its padded batch."""
  switch = vectors.Switch()
  model = switch.model(tmp_path / 'switch')
  encoder, decoder, _, _ = switch.batch()
  recorded = vectors.load('switch_usage_similarity')
  batch = {'encoder_tokens': np.asarray(encoder), 'decoder_tokens': np.asarray(decoder)}
  found = stats.measure(model, [batch], ('routing',), compat='mcsmoe')
  for layer in vectors.LAYERS:
    sums = found.layers['/'.join(vectors.layer_path(layer))]
    share = sums['tokens'] / sums['tokens'].sum()
    np.testing.assert_allclose(share, recorded[f'usage/{layer}'], rtol=1e-6, err_msg=layer)
    np.testing.assert_allclose(
        merge.similarity_core.from_gram(sums['gram']),
        recorded[f'sim/router-logits/{layer}'], atol=1e-5,
    )
  with pytest.raises(UserError, match="kind 'routing' alone"):
    stats.measure(model, [batch], compat='mcsmoe')


@pytest.mark.long(but=('mixtral',))
@pytest.mark.parametrize('family', ('mixtral', 'switch'))
def test_gradients_are_those_of_the_loss(family, tmp_path):
  model, batches = small.model(family), small.batches(family, 1)
  found = gradients.measure(model, batches, micro_batch=4)
  path = 'decoder/layers_1/ffn'
  params = tree.flatten(model.params)
  leaf = f'{path}/experts/wo'

  def loss(shift):
    changed = {**params, leaf: params[leaf].at[1, 2, 3].add(shift)}
    moved = dataclasses.replace(model, params=tree.unflatten(changed))
    return small.loss(moved, family, batches[0])

  step = 1e-2
  numeric = (loss(step) - loss(-step)) / (2 * step)
  got = found.layers[path]['gradient/wo'][1, 2, 3]
  assert got == pytest.approx(numeric, abs=2e-4)
  found.save(tmp_path / 'gradients.npz')
  for step in (
      merge.merge(3, operator='fisher', gradients=str(tmp_path / 'gradients.npz')),
      merge.merge(3, similarity='weight-gradient', gradients=str(tmp_path / 'gradients.npz')),
  ):
    made = compress(model, step, batches).model
    assert np.isfinite(small.logits(made, family)).all()


def test_bad_requests():
  model, batches = small.model('mixtral'), small.batches('mixtral')
  with pytest.raises(UserError, match="kind 'output'.*'outputs'"):
    stats.measure(model, batches, ('output',))
  with pytest.raises(UserError, match='compat'):
    stats.measure(model, batches, compat='paper')
  with pytest.raises(UserError, match='no whole|micro_batch'):
    gradients.measure(model, batches, micro_batch=100)
