"""merge and prune through `compress`: exactness classes, every method, files, resume."""

import dataclasses
from pathlib import Path
import sys

import jax
import numpy as np
import pytest

import moejax
from moejax import tree
from moejax.compress import (
  compress,
  driver,
  dry_run,
  hc_smoe,
  msmoe,
  ream,
  skip_second,
  stats,
  stats_core,
  uncurl,
)
from moejax.compress import merge as merge_lib
from moejax.compress import prune as prune_lib
from moejax.errors import UserError
from moejax.model import Model

sys.path.insert(0, str(Path(__file__).parent))
import small_models as small

pytestmark = pytest.mark.once

FAMILIES = tuple(small.CONFIGS)


def run(family, step, model=None, **kwargs):
  model = model or small.model(family)
  return compress(model, step, small.batches(family), **kwargs)


def held(model):
  return [leaf.shape[0] for path, leaf in tree.flatten(model.params).items()
          if path.endswith('experts/wi')]


def same(a, b):
  flat = tree.flatten(a), tree.flatten(b)
  assert list(flat[0]) == list(flat[1])
  for path, leaf in flat[0].items():
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(flat[1][path]), err_msg=path)


@pytest.mark.long(but=('mixtral',))
@pytest.mark.parametrize('family', FAMILIES)
def test_all_experts_kept_is_the_model(family):
  model = small.model(family)
  pruned = run(family, moejax.prune('reap', experts=small.EXPERTS), model).model
  assert pruned.config == model.config
  same(pruned.params, model.params)
  merged = run(family, moejax.merge(small.EXPERTS, budget='uniform'), model).model
  np.testing.assert_allclose(
      small.logits(merged, family), small.logits(model, family), rtol=0, atol=1e-5
  )


@pytest.mark.long(but=('mixtral', 'grin'))
@pytest.mark.parametrize('family', FAMILIES)
def test_copies_in_any_order_merge_without_loss(family):
  """Two experts that differ in the order of their units are one after alignment."""
  model = small.duplicated(family)
  step = moejax.merge(3, budget='uniform', grouping='agglomerative')
  result = run(family, step, model)
  assert held(result.model) == [3] * len(held(model))
  for row in result.report['layers']:
    assert sorted(row['members'])[0] + 3 == sorted(row['members'])[1], row
    assert row['relative_output_error'] < 1e-5
  np.testing.assert_allclose(
      small.logits(result.model, family), small.logits(model, family), rtol=0, atol=2e-4
  )
  plain = run(family, dataclasses.replace(step, alignment='none'), model).model
  assert np.abs(small.logits(plain, family) - small.logits(model, family)).max() > 1e-2


@pytest.mark.long(but=('mixtral', 'grin'))
@pytest.mark.parametrize('family', FAMILIES)
def test_pruned_experts_never_get_a_token(family):
  result = run(family, moejax.prune('reap', experts=4))
  model = result.model
  assert model.config.moe.num_experts == 4 and not model.config.moe.layer_experts
  kept = {row['path']: row['kept'] for row in result.report['layers']}
  flat, before = tree.flatten(model.params), tree.flatten(small.model(family).params)
  for path, chosen in kept.items():
    layer = path.rpartition('/')[0]
    assert flat[f'{layer}/router/kernel'].shape[1] == 4
    np.testing.assert_array_equal(
        flat[f'{layer}/router/kernel'], np.asarray(before[f'{layer}/router/kernel'])[:, chosen]
    )
    np.testing.assert_array_equal(flat[f'{path}/wi'], np.asarray(before[f'{path}/wi'])[chosen])
  batch = small.batches(family, 1)[0]
  tokens = (batch['encoder_tokens'], batch['decoder_tokens']) if family == 'switch' else (
      batch['tokens'],
  )
  for routing in model.apply(*tokens).routings.values():
    assert int(routing.choice_mk.max()) < 4
    assert routing.load_e.shape == (4,)


@pytest.mark.parametrize('method', prune_lib.METHODS)
def test_every_method_of_pruning(method):
  result = run('mixtral', moejax.prune(method, experts=3, samples=64, beta=0.9))
  least = [3, 3]
  got = held(result.model)
  assert all(n >= m for n, m in zip(got, least)), got
  assert method == 'task_specific' or got == least
  again = run('mixtral', moejax.prune(method, experts=3, samples=64, beta=0.9))
  same(result.model.params, again.model.params)
  assert result.report['after']['stored_bytes'] < result.report['before']['stored_bytes']


STEPS = {
    **{f'similarity {s}': moejax.merge(3, budget='uniform', similarity=s)
       for s in merge_lib.SIMILARITIES if 'gradient' not in s},
    **{f'grouping {g}': moejax.merge(3, budget='uniform', grouping=g)
       for g in merge_lib.GROUPINGS},
    **{f'alignment {a}': moejax.merge(3, budget='uniform', alignment=a)
       for a in merge_lib.ALIGNMENTS},
    **{f'operator {o}': moejax.merge(3, budget='uniform', operator=o)
       for o in merge_lib.OPERATORS if o != 'fisher'},
    **{f'router {r}': moejax.merge(3, budget='uniform', router=r) for r in merge_lib.ROUTERS},
    'msmoe': msmoe(3), 'msmoe uniform': msmoe(3, budget='uniform'), 'uncurl': uncurl(3),
    'hc_smoe': hc_smoe(3), 'ream': ream(3),
    'alone group': moejax.merge(2, budget='uniform', dominant_alone='group'),
    'alone all': moejax.merge(3, budget='uniform', dominant_alone='all'),
}


@pytest.mark.parametrize('name', STEPS)
def test_every_way_of_merging(name):
  step = STEPS[name]
  result = run('mixtral', step)
  model = result.model
  assert sum(held(model)) <= 8
  assert np.isfinite(small.logits(model, 'mixtral')).all()
  members = {}
  for row in result.report['layers']:
    members.setdefault(row['path'], []).extend(row['members'])
  for path, ids in members.items():
    assert sorted(ids) == list(range(small.EXPERTS)), path
  rows = tree.flatten(model.params)['decoder/layers_0/ffn/router/kernel'].shape[1]
  assert rows == (small.EXPERTS if step.router in ('remap', 'sum') else held(model)[0])


def test_sequential_plans_look_behind_the_merged_layers():
  """The first layer is grouped as at once, the next as the model with that one merged has it."""
  model, batches = small.model('mixtral'), small.batches('mixtral')
  rows = lambda step, layer: [
      row for row in compress(model, step, batches).report['layers']
      if row['path'].startswith(f'decoder/layers_{layer}/')
  ]
  step = ream(3)
  assert step.sequential
  once = dataclasses.replace(step, sequential=False)
  pick = lambda found: [(r['members'], r['dominant'], round(r['usage'], 9)) for r in found]
  assert pick(rows(step, 0)) == pick(rows(once, 0))
  half = compress(
      model, dataclasses.replace(once, layers='decoder/layers_0/.*'), batches
  ).model
  usage = stats_core.usage(
      stats.measure(half, batches, ('routing',)).of('decoder/layers_1/ffn')
  )
  sequential = rows(step, 1)
  for row in sequential:
    assert row['usage'] == pytest.approx(usage[row['members']].sum(), abs=1e-6)
  planned = stats_core.usage(
      stats.measure(model, batches, ('routing',)).of('decoder/layers_1/ffn')
  )
  assert not np.allclose(planned, usage)


def test_global_budgets_meet_their_average():
  pruned = run('qwen2_moe', moejax.prune('reap', experts=3.5, budget='global')).model
  assert sum(held(pruned)) == 7 and min(held(pruned)) >= 2
  merged = run('qwen2_moe', moejax.merge(3)).model
  assert sum(held(merged)) <= 6
  listed = run('qwen2_moe', moejax.prune('frequency', experts=(2, 5))).model
  assert held(listed) == [2, 5] and listed.config.moe.layer_experts == (2, 5)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('step', (
    moejax.prune('reap', experts=4), moejax.merge(4, budget='uniform'),
    moejax.merge(4, budget='uniform', router='slice'),
), ids=('prune', 'remap', 'slice'))
def test_a_dry_run_tells_the_size(family, step):
  model = small.model(family)
  told = dry_run(model, step)
  made = run(family, step, model)
  assert told['after'] == {**made.report['after'], 'loss': None}


@pytest.mark.long(but=('qwen2_moe',))
@pytest.mark.parametrize('family', FAMILIES)
def test_to_hugging_face_and_back(family, tmp_path):
  pruned = run(family, moejax.prune('reap', experts=4)).model
  moejax.to_hf(pruned, tmp_path / 'hf')
  again = moejax.from_hf(tmp_path / 'hf')
  assert again.config.moe.num_experts == 4
  np.testing.assert_allclose(
      small.logits(again, family), small.logits(pruned, family), rtol=0, atol=1e-5
  )
  uneven = run(family, moejax.prune('reap', experts=(4, 5, 4)[: 3 if family == 'switch' else 2]))
  with pytest.raises(UserError, match=r'transformers knows one number of experts'):
    moejax.to_hf(uneven.model, tmp_path / 'uneven')
  assert not (tmp_path / 'uneven').exists()
  if pruned.config.moe.top_k == 2:
    skipping = run(family, skip_second(0.5), pruned).model
    with pytest.raises(UserError, match='cannot skip a second expert'):
      moejax.to_hf(skipping, tmp_path / 'uneven')


@pytest.mark.long(but=('mixtral',))
@pytest.mark.torch
@pytest.mark.parametrize('family', ('switch', 'mixtral'))
def test_transformers_runs_what_is_left(family, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  pruned = run(family, moejax.prune('reap', experts=4)).model
  moejax.to_hf(pruned, tmp_path / 'hf')
  batch = small.batches(family, 1, 7)[0]
  ids = lambda name: torch.tensor(batch[name].astype(np.int64))
  if family == 'switch':
    kind = transformers.SwitchTransformersForConditionalGeneration
    theirs = kind.from_pretrained(tmp_path / 'hf')
    tokens = ids('encoder_tokens')
    inputs = {'input_ids': tokens, 'attention_mask': (tokens != 0).long(),
              'decoder_input_ids': ids('decoder_tokens')}
  else:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    inputs = {'input_ids': ids('tokens')}
  with torch.no_grad():
    want = theirs.eval()(**inputs).logits.float().numpy()
  np.testing.assert_allclose(small.logits(pruned, family), want, rtol=0, atol=2e-4)


def test_a_map_that_leads_nowhere(tmp_path):
  made = run('mixtral', moejax.merge(3, budget='uniform')).model
  flat = dict(tree.flatten(made.params))
  path = 'decoder/layers_0/ffn/expert_map'
  flat[path] = flat[path].at[2].set(3)
  Model(made.config, tree.unflatten(flat)).save(tmp_path / 'model')
  with pytest.raises(UserError, match=r'expert_map.* leads to experts .* 0 to 2'):
    Model.load(tmp_path / 'model')


def test_layers_left_out_stay():
  model = small.model('switch')
  made = run('switch', moejax.merge(2, budget='uniform', layers='decoder/.*'), model).model
  flat, before = tree.flatten(made.params), tree.flatten(model.params)
  assert flat['encoder/layers_1/ffn/experts/wi'].shape[0] == small.EXPERTS
  np.testing.assert_array_equal(
      flat['encoder/layers_1/ffn/expert_map'], np.arange(small.EXPERTS)
  )
  for path in before:
    if path.startswith('encoder/'):
      np.testing.assert_array_equal(np.asarray(flat[path]), np.asarray(before[path]))
  assert held(made) == [2, 2, 6]  # The decoder comes first in the tree.


@pytest.mark.parametrize('family', ('switch', 'mixtral'))
def test_summed_groups_choose_by_summed_probabilities(family):
  model = small.model(family)
  made = run(family, moejax.merge(3, budget='uniform', router='sum'), model).model
  batch = small.batches(family, 1)[0]
  tokens = (batch['encoder_tokens'], batch['decoder_tokens']) if family == 'switch' else (
      batch['tokens'],
  )
  # Before the first sparse layer both models are one.
  path = 'encoder/layers_1/ffn' if family == 'switch' else 'decoder/layers_0/ffn'
  routing = made.apply(*tokens).routings[path]
  own = np.asarray(jax.nn.softmax(model.apply(*tokens).routings[path].logits_me))
  leads = np.asarray(tree.flatten(made.params)[f'{path}/expert_map'])
  summed = np.stack([own[:, leads == g].sum(1) for g in range(3)], 1)
  np.testing.assert_allclose(jax.nn.softmax(routing.logits_me), summed, atol=1e-5)
  np.testing.assert_array_equal(np.asarray(routing.choice_mk[:, 0]), summed.argmax(1))


@pytest.mark.long
def test_the_walk_is_the_merged_model():
  """The report's loss, from the walk behind a changed router, is that of the model it made."""
  for family, step in (
      ('mixtral', moejax.merge(3)), ('mixtral', moejax.prune('reap', experts=3)),
      ('qwen2_moe', moejax.merge(3, router='sum')), ('grin', moejax.prune('ean', experts=3)),
      ('switch', moejax.merge(2)), ('mixtral', skip_second()),
  ):
    batches = small.batches(family, 1, 3)
    result = run(family, step, validation_batches=batches)
    want = small.loss(result.model, family, batches[0])
    assert result.report['loss'] == pytest.approx(want, abs=2e-5), step
    assert result.report['loss'] != pytest.approx(result.report['before']['loss'], abs=1e-6)


def test_skipping_drops_half_of_the_second_choices():
  model = small.model('mixtral')
  made = run('mixtral', skip_second(), model).model
  same(made.params, model.params)
  assert len(made.config.moe.skip) == 2 and all(0 < s < 1 for s in made.config.moe.skip)
  assert np.abs(small.logits(made, 'mixtral') - small.logits(model, 'mixtral')).max() > 1e-3


class Stop(Exception):
  pass


@pytest.mark.parametrize('step', (
    moejax.merge(3, expert_group=1, operator='least_squares'),
    moejax.prune('naee', experts=4, samples=32, expert_group=1),
), ids=('merge', 'prune'))
@pytest.mark.parametrize('after', (1, 3))
def test_killed_and_run_again_it_writes_the_same_files(step, after, tmp_path, monkeypatch):
  model = small.model('mixtral')
  model.save(tmp_path / 'model')
  batches = small.batches('mixtral')
  compress(tmp_path / 'model', step, batches, tmp_path / 'whole')
  saved = 0
  real = driver.walker.parts.save_group

  def stop(folder, group):
    nonlocal saved
    saved += 1
    if saved > after:
      raise Stop
    real(folder, group)

  monkeypatch.setattr(driver.walker.parts, 'save_group', stop)
  with pytest.raises(Stop):
    compress(tmp_path / 'model', step, batches, tmp_path / 'cut')
  assert not (tmp_path / 'cut').exists()
  monkeypatch.setattr(driver.walker.parts, 'save_group', real)
  # What was planned is not planned again.
  monkeypatch.setattr(stats, 'of_samples', None)
  compress(tmp_path / 'model', step, batches, tmp_path / 'cut')
  for file in sorted((tmp_path / 'whole').iterdir()):
    if file.name in ('report.json',):
      continue
    assert file.read_bytes() == (tmp_path / 'cut' / file.name).read_bytes(), file.name


@pytest.mark.parametrize('make, message', (
    (lambda: moejax.merge(7, budget='uniform'), '7 experts for .*which has 6: between 1 and 6'),
    (lambda: moejax.merge(7), '7 groups a layer cannot be made'),
    (lambda: moejax.prune('reap', experts=0), '0 experts for .*between 1 and 6'),
    (lambda: moejax.prune('reap', experts=1), 'each token meets top_k = 2'),
    (lambda: moejax.prune('reap', experts=2.5), 'a whole number with budget'),
    (lambda: moejax.prune('reep', experts=2), "'reap'"),
    (lambda: moejax.merge(3, similarity='router_logits'), 'router-logits'),
    (lambda: moejax.merge(3, ratio=0.5), 'give one of'),
    (lambda: moejax.prune('reap'), 'give one of'),
    (lambda: moejax.prune('reap', ratio=1.0), r'ratio = 1\.0'),
    (lambda: moejax.prune('reap', experts=(1, 2, 3)), '3 numbers for the 2 layers'),
    (lambda: moejax.prune('reap', experts=3, layers='encoder/.*'), 'takes no sparse layer'),
    (lambda: moejax.prune('reap', experts=3, layers='('), 'no regular expression'),
    (lambda: moejax.merge(3, operator='fisher'), 'gradients must name the file'),
    (lambda: moejax.merge(3, sequential=True, similarity='weight'), 'sequential = True is for'),
))
def test_bad_settings_end_in_one_line(make, message):
  with pytest.raises(UserError, match=message) as error:
    run('mixtral', make())
  assert '\n' not in str(error.value)


def test_statistics_must_be_of_the_model():
  other = stats.measure(small.model('mixtral', 1), small.batches('mixtral'))
  with pytest.raises(UserError, match='of another model'):
    run('mixtral', moejax.prune('reap', experts=3), statistics=other)
  routing = stats.measure(small.model('mixtral'), small.batches('mixtral'), ('routing',))
  with pytest.raises(UserError, match=r"needs statistics of kind \['outputs'\]"):
    run('mixtral', moejax.prune('reap', experts=3), statistics=routing)
  found = stats.measure(small.model('mixtral'), small.batches('mixtral'))
  found.layers['decoder/layers_1/ffn']['gate_norm'][2] = np.nan
  with pytest.raises(UserError, match=r'decoder/layers_1/ffn: gate_norm .* experts \[2\]'):
    run('mixtral', moejax.prune('reap', experts=3), statistics=found)


def test_it_must_have_experts_that_are_arrays():
  dense = dataclasses.replace(small.CONFIGS['mixtral'], moe=None)
  params = moejax.init_params(dense, jax.random.key(0))
  with pytest.raises(UserError, match='no experts'):
    run('mixtral', moejax.prune('reap', experts=3), Model(dense, params))
  quantized = run('mixtral', moejax.quantize(4)).model
  with pytest.raises(UserError, match='merge first, then compress'):
    run('mixtral', moejax.merge(3), quantized)
  merged = run('mixtral', moejax.merge(3)).model
  with pytest.raises(UserError, match='merged'):
    run('mixtral', moejax.prune('reap', experts=2), merged)


@pytest.mark.long(but=('switch', 'grin', 'mixtral'))
@pytest.mark.parametrize('family', FAMILIES)
def test_an_expert_no_token_chose(family):
  """Its sums are 0, it is the first to go, and merging gives it no weight."""
  model = small.model(family)
  flat = dict(tree.flatten(model.params))
  for path in flat:
    if path.endswith('router/kernel'):
      flat[path] = flat[path].at[:, 2].set(0.0)
  model = Model(model.config, tree.unflatten(flat))
  found = stats.measure(model, small.batches(family, 1))
  for sums in found.layers.values():
    sums['tokens'][2], sums['gate'][2], sums['norm'][2] = 0.0, 0.0, 0.0
    sums['gate_norm'][2], sums['output'][2] = 0.0, 0.0
  pruned = run(family, moejax.prune('reap', experts=5), model, statistics=found)
  assert all(row['dropped'] == [2] for row in pruned.report['layers'])
  merged = run(family, moejax.merge(3, similarity='output', budget='uniform'), model,
               statistics=stats.Statistics(
                   layers=found.layers, kinds=('routing', 'outputs'), tokens=found.tokens,
                   model=found.model))
  assert np.isfinite(small.logits(merged.model, family)).all()
