"""Similarity, grouping, alignment and merging against the arrays of MC-SMoE's published code."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.compress import (
  align_core,
  compress,
  grouping_core,
  merge_core,
  msmoe,
  similarity_core,
  sources,
  stats_core,
)
from moejax.compress import stats as stats_lib
from moejax.model import apply_fn

pytestmark = pytest.mark.once

_SPEC = importlib.util.spec_from_file_location(
    'mcsmoe_vectors', Path(__file__).with_name('mcsmoe_vectors.py')
)
vectors = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(vectors)
LAYERS = vectors.LAYERS
MERGED = LAYERS[1:]


@pytest.fixture(scope='module')
def switch():
  return vectors.Switch()


@pytest.fixture(scope='module')
def stats():
  return vectors.load('switch_usage_similarity')


@pytest.fixture(scope='module')
def grouping():
  return vectors.load('switch_grouping')


@pytest.fixture(scope='module')
def merged():
  return vectors.load('switch_merge')


@pytest.fixture(scope='module')
def aligned(switch):
  return {layer: align_core.in_one_order(switch.experts(layer), 0)[0] for layer in LAYERS}


def counted(logits, mask=None, **compat):
  choice = np.argmax(logits, 1)[:, None].astype(np.int32)
  mask = np.ones(len(logits), bool) if mask is None else mask
  return stats_core.routing_sums(logits, choice, np.ones(choice.shape), mask, **compat)


def test_usage_counts_padding_only_as_published(switch, stats):
  real = switch.data['in/attention_mask'].reshape(-1) > 0
  for layer in LAYERS:
    np.testing.assert_allclose(
        stats_core.usage(counted(switch.logits(layer))), stats[f'usage/{layer}'], atol=1e-6
    )
  masked = stats_core.usage(counted(switch.logits('enc1'), real))
  want = np.bincount(switch.choice('enc1')[real], minlength=8) / real.sum()
  np.testing.assert_allclose(masked, want, atol=1e-6)
  assert np.abs(masked - stats['usage/enc1']).max() > 0.01


def test_choices_dropped_for_capacity_count_for_expert_0_only_as_published():
  data = vectors.load('capacity_overflow')
  for layer in LAYERS:
    logits = data[f'router_logits/{layer}']
    choice = logits.argmax(-1)
    place = np.stack([
        [(row[: i + 1] == row[i]).sum() for i in range(len(row))] for row in choice
    ])
    keep = (place <= data['expert_capacity']).reshape(-1, 1)
    flat = logits.reshape(-1, 8)
    np.testing.assert_allclose(
        stats_core.usage(counted(flat)), data[f'usage_argmax/{layer}'], atol=1e-6
    )
    published = counted(flat, keep_mk=keep, dropped_to_first=True)
    np.testing.assert_allclose(
        stats_core.usage(published), data[f'usage_reference/{layer}'], atol=1e-6
    )


def sums(of, inputs):
  return np.stack([of(x).sum(0) for x in inputs])


def means(of, inputs):
  return np.stack([of(x).mean(0) if len(x) else np.zeros(x.shape[1]) for x in inputs])


BASES = {
    'router-logits': lambda s, m: similarity_core.from_gram(counted(s.logits(m))['gram']),
    'router-weight': lambda s, m: similarity_core.router_weight(s.router(m)),
    'weight': lambda s, m: similarity_core.weight(s.experts(m)),
    'feature': lambda s, m: similarity_core.from_vectors(means(lambda x: x, s.inputs_of(m))),
    'feature.abs': lambda s, m: similarity_core.from_vectors(means(np.abs, s.inputs_of(m))),
    'weight-feature': lambda s, m: similarity_core.weight_feature(
        s.experts(m), sums(np.square, s.inputs_of(m))
    ),
    'router-weight-feature': lambda s, m: similarity_core.router_weight_feature(
        s.router(m), np.square(s.inputs(m)).sum(0)
    ),
    'mse': lambda s, m: similarity_core.mse(s.experts(m), s.inputs_of(m), 'relu'),
    'feature-correlation.lsa': lambda s, m: similarity_core.feature_correlation(
        s.experts(m), s.inputs_of(m), 'relu'
    ),
    'feature-correlation.max': lambda s, m: similarity_core.feature_correlation(
        s.experts(m), s.inputs_of(m), 'relu', match='max'
    ),
}


@pytest.mark.parametrize('basis', BASES)
def test_similarities(basis, switch, stats):
  for layer in LAYERS:
    got, want = BASES[basis](switch, layer), stats[f'sim/{basis}/{layer}']
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4 if basis == 'mse' else 2e-5)


@pytest.mark.parametrize('merge', ['sel', 'all'])
@pytest.mark.parametrize('average', [2, 3, 4])
def test_global_groups(merge, average, stats, grouping):
  usage = {layer: stats[f'usage/{layer}'] for layer in LAYERS}
  only = set(LAYERS) - {'enc1'} if merge == 'sel' else None
  counts = grouping_core.global_counts(usage, average, only)
  for layer in LAYERS:
    want = lambda name, layer=layer: grouping[f'global/{merge}/K{average}/{name}/{layer}']
    groups = grouping_core.assign(stats[f'sim/router-logits/{layer}'], usage[layer], counts[layer])
    assert counts[layer] == want('num_groups')
    np.testing.assert_array_equal(groups.dominant, want('core'))
    np.testing.assert_array_equal(groups.labels, want('labels'))


@pytest.mark.parametrize('average', [2, 3, 4])
def test_uniform_groups_and_the_published_defect(average, stats, grouping):
  for layer in LAYERS:
    args = stats[f'sim/router-logits/{layer}'], stats[f'usage/{layer}'], average
    want = lambda name, layer=layer: grouping[f'uniform/K{average}/{name}/{layer}']
    groups = grouping_core.assign(*args)
    np.testing.assert_array_equal(groups.dominant, want('core'))
    np.testing.assert_array_equal(groups.labels, want('labels_paper_rule'))
    published = grouping_core.assign_as_published(*args)
    np.testing.assert_array_equal(published.labels, want('labels_reference'))


@pytest.mark.parametrize('case, include_wo', [('weight_wo1', True), ('weight_wo0', False)])
def test_orders_by_weights(case, include_wo, switch):
  want = vectors.load('switch_permutation')
  for layer in LAYERS:
    experts = switch.experts(layer)
    one = lambda e, experts=experts: {name: w[e] for name, w in experts.items()}
    if include_wo:
      np.testing.assert_allclose(
          align_core.profit(one(0), one(1)), want[f'profit_e0_e1/{layer}'], atol=1e-5
      )
    _, orders = align_core.in_one_order(experts, 0, include_wo)
    np.testing.assert_array_equal(orders, want[f'perm/{case}/{layer}'])


@pytest.mark.parametrize('tokens', ['all', 'pair'])
def test_orders_by_activations(tokens, switch):
  want = vectors.load('switch_permutation')
  for layer in LAYERS:
    experts, inputs = switch.experts(layer), switch.inputs_of(layer)
    one = lambda e, experts=experts: {name: w[e] for name, w in experts.items()}
    for e in range(1, 8):
      x = np.concatenate([inputs[0], inputs[e]]) if tokens == 'pair' else switch.inputs(layer)
      hidden = [align_core.hidden_units(one(i), x, 'relu') for i in (0, e)]
      order = align_core.match(align_core.correlation(*hidden))
      np.testing.assert_array_equal(order, want[f'perm/activation_{tokens}tokens/{layer}'][e])


def labels_of(grouping, layer):
  return grouping[f'global/sel/K3/labels/{layer}'], grouping[f'global/sel/K3/core/{layer}']


def check(made, merged, tag, layer, labels, atol=1e-5):
  """`rep` names each slot's expert; `idx` the order in which the experts are recorded."""
  want = vectors.ours(merged[f'{tag}/wi/{layer}'], merged[f'{tag}/wo/{layer}'])
  index = merged[f'{tag}/idx/{layer}']
  for slot, holder in enumerate(merged[f'{tag}/rep/{layer}']):
    for name in ('wi', 'wo'):
      got = np.asarray(made[name])[labels[slot]]
      np.testing.assert_allclose(got, want[name][list(index).index(holder)], rtol=0, atol=atol)


TAGS = (
    'freq_aligned', 'freq_noalign', 'freq_permute_in_group', 'freq_reversed_aligned',
    'average_aligned', 'fisher_aligned', 'zip_weight_freq', 'zip_activation_freq', 'prune_replace',
    'merge_noncore_only', 'merge_all_noncore_to_one',
)


@pytest.fixture(scope='module')
def make(switch, stats, grouping, merged, aligned):
  """(tag, layer) -> (merged experts, labels)."""

  @functools.cache
  def made(tag, layer):
    labels, core = labels_of(grouping, layer)
    usage, plain = stats[f'usage/{layer}'], switch.experts(layer)
    if tag == 'prune_replace':
      return merge_core.pick(plain, core), labels
    if tag.startswith('zip'):
      by_activations = tag == 'zip_activation_freq'
      return zipped(plain, labels, usage, switch.inputs_of(layer), by_activations), labels
    if tag == 'freq_permute_in_group':
      for group in range(labels.max() + 1):
        members = np.flatnonzero(labels == group)
        plain, _ = align_core.in_one_order(plain, members[0], members=members)
      return merge_core.weighted(plain, labels, usage), labels
    if tag.startswith('merge_'):
      labels = grouping_core.beside_dominant(
          grouping_core.Groups(core, labels), together=tag == 'merge_all_noncore_to_one'
      )
      return merge_core.weighted(aligned[layer], labels, usage, unused='zero'), labels
    if tag == 'fisher_aligned':
      f = vectors.ours(merged[f'fisher/wi/{layer}'], merged[f'fisher/wo/{layer}'])
      return merge_core.fisher(aligned[layer], labels, f), labels
    experts = plain if tag == 'freq_noalign' else aligned[layer]
    weights = {'freq_reversed_aligned': 1 - usage, 'average_aligned': np.ones(8)}.get(tag, usage)
    return merge_core.weighted(experts, labels, weights), labels

  return made


@pytest.mark.parametrize('tag', TAGS)
def test_operators(tag, make, merged):
  for layer in MERGED:
    made, labels = make(tag, layer)
    check(made, merged, tag, layer, labels, 1e-4 if tag == 'fisher_aligned' else 1e-5)


@pytest.fixture(scope='module')
def model(switch, tmp_path_factory):
  return switch.model(tmp_path_factory.mktemp('hf') / 'model')


def test_logits_of_the_merged_models(make, merged, model, switch):
  """Each slot of a layer given its group's expert: the published model, whole."""
  tokens, decoder, mask, _ = switch.batch(4)
  run = jax.jit(
      lambda params: apply_fn(model.config, params, tokens, decoder, encoder_mask=mask).logits_btv
  )
  np.testing.assert_allclose(run(model.params), switch.data['out/logits'][:4], atol=1e-5)
  for tag in TAGS:
    params = jax.tree.map(lambda x: x, model.params)
    for layer in MERGED:
      made, labels = make(tag, layer)
      stack, block, ffn = vectors.layer_path(layer)
      params[stack][block][ffn]['experts'] = {
          name: jnp.asarray(w)[labels] for name, w in made.items()
      }
    np.testing.assert_allclose(run(params), merged[f'{tag}/logits'], atol=1e-4, err_msg=tag)


@pytest.mark.long
def test_similarities_by_gradients(switch, stats, model):
  loss, grads = jax.jit(jax.value_and_grad(lambda p: switch.loss(model.config, p)))(model.params)
  np.testing.assert_allclose(loss, switch.data['out/loss'], rtol=1e-6)
  for layer in LAYERS:
    stack, block, ffn = vectors.layer_path(layer)
    own = grads[stack][block][ffn]['experts']
    np.testing.assert_allclose(
        similarity_core.weight(own), stats[f'sim/gradient/{layer}'], atol=2e-5
    )
    np.testing.assert_allclose(
        similarity_core.weight_gradient(switch.experts(layer), own),
        stats[f'sim/weight-gradient/{layer}'], atol=2e-5,
    )


def zipped(experts, labels, usage, inputs, by_activations):
  groups = []
  for group in range(labels.max() + 1):
    members = np.flatnonzero(labels == group)
    own = {name: w[members] for name, w in experts.items()}
    correlation = None
    if by_activations:
      x = np.concatenate([inputs[e] for e in members])
      hidden = [
          align_core.hidden_units({n: w[e] for n, w in experts.items()}, x, 'relu') for e in members
      ]
      hidden = np.concatenate(hidden, 1)
      correlation = align_core.correlation(hidden, hidden)
    groups.append(merge_core.zip_units(own, usage[members], correlation))
  return {name: np.stack([g[name] for g in groups]) for name in ('wi', 'wo')}


def test_stable_ranks(grouping, stats, merged, aligned):
  for layer in MERGED:
    labels, _ = labels_of(grouping, layer)
    made = merge_core.weighted(aligned[layer], labels, stats[f'usage/{layer}'])
    for name in ('wi', 'wo'):
      before = merge_core.stable_rank(aligned[layer][name])
      np.testing.assert_allclose(before, merged[f'stable_rank_before/{name}/{layer}'], atol=1e-4)
      after = np.asarray(merge_core.stable_rank(made[name]))[labels]
      np.testing.assert_allclose(after, merged[f'stable_rank_after/{name}/{layer}'], atol=1e-4)


def test_a_group_that_no_token_chose_is_a_plain_mean():
  experts = {'wi': np.arange(24.0).reshape(4, 2, 3), 'wo': np.ones((4, 3, 2))}
  made = merge_core.weighted(experts, np.array([0, 1, 1, 0]), np.array([1.0, 0.0, 0.0, 3.0]))
  np.testing.assert_allclose(made['wi'][1], experts['wi'][1:3].mean(0), rtol=1e-6)
  np.testing.assert_allclose(
      made['wi'][0], (experts['wi'][0] + 3 * experts['wi'][3]) / 4, rtol=1e-6
  )


@pytest.mark.parametrize('average', [2, 3, 4])
def test_mixtral(average):
  data = vectors.load('mixtral_merge')
  usage = {f'layer{i}': data[f'usage/layer{i}'] for i in range(3)}
  counts = grouping_core.global_counts(usage, average)
  for i, layer in enumerate(usage):
    block = f'param/model.layers.{i}.block_sparse_moe'
    names = {'gate': 'w1', 'wi': 'w3', 'wo': 'w2'}
    experts = {
        ours: np.stack([data[f'{block}.experts.{e}.{theirs}.weight'].T for e in range(8)])
        for ours, theirs in names.items()
    }
    alike = similarity_core.from_vectors(
        data['out/router_logits_all'][:, i].reshape(-1, 8).T
    )
    np.testing.assert_allclose(alike, data[f'sim/router-logits/{layer}'], atol=2e-5)
    np.testing.assert_allclose(
        similarity_core.router_weight(data[f'{block}.gate.weight'].T),
        data[f'sim/router-weight/{layer}'], atol=2e-5,
    )
    np.testing.assert_allclose(
        similarity_core.weight(experts), data[f'sim/weight/{layer}'], atol=2e-5
    )
    groups = grouping_core.assign(alike, usage[layer], counts[layer])
    np.testing.assert_array_equal(groups.dominant, data[f'K{average}/dom/{layer}'])
    np.testing.assert_array_equal(groups.labels, data[f'K{average}/labels/{layer}'])
    made = merge_core.weighted(experts, groups.labels, usage[layer])
    holders = sorted(set(data[f'K{average}/rep/{layer}'].tolist()))
    for slot, holder in enumerate(data[f'K{average}/rep/{layer}']):
      for ours, theirs in names.items():
        np.testing.assert_allclose(
            made[ours][groups.labels[slot]],
            data[f'K{average}/{theirs}/{layer}'][holders.index(holder)].T, rtol=0, atol=1e-5,
        )


def test_experts_with_biases():
  """fairseq's: first-layer biases move with their units and are in no profit; eps is 1e-3."""
  data = vectors.load('fsgpt_merge')
  usage = {f'layer{i}': data[f'usage/layer{i}'] for i in (1, 3)}
  for layer in usage:
    get = lambda name, layer=layer: data[f'in/{name}/{layer}']
    experts = {'wi': get('fc1.weight').swapaxes(1, 2), 'wo': get('fc2.weight').swapaxes(1, 2),
               'wi_bias': get('fc1.bias'), 'wo_bias': get('fc2.bias')}
    count = len(data[f'core/{layer}'])
    groups = grouping_core.assign(data[f'sim/{layer}'], usage[layer], count)
    np.testing.assert_array_equal(groups.dominant, data[f'core/{layer}'])
    np.testing.assert_array_equal(groups.labels, data[f'labels_paper_rule/{layer}'])
    published = grouping_core.assign_as_published(data[f'sim/{layer}'], usage[layer], count)
    np.testing.assert_array_equal(published.labels, data[f'labels_reference/{layer}'])
    _, orders = align_core.in_one_order(experts, 0)
    np.testing.assert_array_equal(orders, data[f'perm/{layer}'])
    made = merge_core.weighted(experts, groups.labels, usage[layer], eps=float(data['eps']))
    holders = sorted(set(data[f'out/rep/{layer}'].tolist()))
    for slot, holder in enumerate(data[f'out/rep/{layer}']):
      for name, theirs in (('wi', 'fc1.weight'), ('wo', 'fc2.weight'), ('wi_bias', 'fc1.bias'),
                           ('wo_bias', 'fc2.bias')):
        want = data[f'out/{theirs}/{layer}'][holders.index(holder)]
        np.testing.assert_allclose(
            made[name][groups.labels[slot]], want.T, rtol=0, atol=1e-5, err_msg=name
        )


STEPS = {
    'freq_aligned': {}, 'freq_noalign': {'alignment': 'none'},
    'average_aligned': {'operator': 'uniform'}, 'prune_replace': {'operator': 'dominant'},
    'prune_drop': {'operator': 'dominant', 'alignment': 'none', 'router': 'slice'},
    'zip_weight_freq': {'operator': 'zipit-weights'},
    'merge_noncore_only': {'dominant_alone': 'group'},
    'merge_all_noncore_to_one': {'dominant_alone': 'all'},
}


def information_file(model, merged, switch, file):
  """Writes the published Fisher information, of aligned experts, as that of the model's own."""
  layers = {}
  for layer in MERGED:
    _, orders = align_core.in_one_order(switch.experts(layer), 0)
    aligned = vectors.ours(merged[f'fisher/wi/{layer}'], merged[f'fisher/wo/{layer}'])
    own = align_core.permute_each(aligned, np.argsort(orders, 1))
    layers['/'.join(vectors.layer_path(layer))] = {f'square/{n}': w for n, w in own.items()}
  stats_lib.Statistics(
      layers=layers, kinds=('gradients',), tokens={},
      model=stats_lib.identity(sources.open_source(model)),
  ).save(file)
  return str(file)


@pytest.mark.long
def test_the_published_models_come_out_of_compress(merged, model, switch, tmp_path):
  """From the padded batch to the logits of the model: statistics, groups, orders and averages."""
  tokens, decoder, _, labels = switch.batch()
  batch = {
      'encoder_tokens': np.asarray(tokens), 'decoder_tokens': np.asarray(decoder),
      'targets': np.maximum(labels, 0), 'weights': (np.asarray(labels) >= 0).astype(np.float32),
  }
  statistics = stats_lib.measure(model, [batch], ('routing',), compat='mcsmoe')
  few, shifted, mask, _ = switch.batch(4)
  information = information_file(model, merged, switch, tmp_path / 'fisher.npz')
  fisher = {'operator': 'fisher', 'gradients': information}
  for tag, changes in {**STEPS, 'fisher_aligned': fisher}.items():
    step = msmoe(3, layers='(?!encoder/layers_1/).*', **changes)
    made = compress(model, step, [batch], statistics=statistics).model
    got = made.apply(few, shifted, encoder_mask=mask).logits_btv
    np.testing.assert_allclose(got, merged[f'{tag}/logits'], atol=1e-4, err_msg=tag)
