"""Dense layers as experts: the same function with all of them, less work with some."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import moejax
from moejax import account, config, sharding, store, tree
from moejax.compress import (
  as_dense,
  chain,
  compress,
  dry_run,
  prune_units,
  routers,
  split_core,
)
from moejax.compress.merge import merge
from moejax.compress.moefy import moefy
from moejax.compress.prune import prune
from moejax.compress.quantize import quantize
from moejax.errors import UserError
from moejax.model import Model

_SPEC = importlib.util.spec_from_file_location(
    'small_models', Path(__file__).with_name('small_models.py')
)
small = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(small)

# Family -> what it is split by and chosen with; between them every split and every choice.
WAYS = {
    't5': [
        dict(), dict(split='coactivation', choice='cosine', calibrate=True),
        dict(split='contiguous', choice='oracle'),
    ],
    't5_gated': [
        dict(split='random', choice='average'), dict(choice='norm', rule='within', epochs=2)
    ],
    'opt': [dict(choice='euclid', fill=True), dict(split='random', choice='oracle')],
    'llama': [dict(split='shared', shared=1 / 3, choice='representatives')],
    'llama_biased': [dict(choice='random', fill=True, calibrate=True)],
    'bert': [
        dict(split='coactivation', choice='norm', rule='cumulative', epochs=2),
        dict(choice='cosine', fill=True, calibrate=True),
    ],
}
ALL = [(family, way) for family, ways in WAYS.items() for way in ways]


def everything(way):
  """So that every expert runs."""
  return dict(tau=1.0) if 'rule' in way else dict(share=1.0)


def name(value):
  return value if isinstance(value, str) else '_'.join(map(str, value.values())) or 'default'


@pytest.mark.long(but=(
    'bert-cosine_True_True', 'llama-shared_0.3333333333333333_representatives',
    'opt-random_oracle',
))
@pytest.mark.parametrize('family, way', ALL, ids=name)
def test_all_experts_are_the_dense_layer_and_some_are_what_the_report_says(family, way):
  model, batches = small.model(family), small.batches(family, 4)
  want = small.logits(model, family)
  whole = compress(
      model, moefy(6, **{**way, **everything(way), 'calibrate': False}), batches
  ).model
  close = dict(rtol=0, atol=2e-6 * np.abs(want).max())
  np.testing.assert_allclose(small.logits(whole, family), want, **close)
  back = as_dense(whole)
  assert back.config == model.config
  np.testing.assert_allclose(small.logits(back, family), want, **close)
  result = compress(model, moefy(6, share=0.5, **way), batches, validation_batches=batches[:1])
  some, report = result.model, result.report
  got = small.logits(some, family)
  assert np.isfinite(got).all() and np.abs(got - want).max() > 1e-3
  if way.get('choice') != 'random':  # Which draws by place in a batch.
    assert report['loss'] == pytest.approx(small.loss(some, family, batches[0]), rel=1e-5)
  for row in report['layers']:
    assert 0 < row['relative_output_error'] < 1.5 and 0 < row['neurons_run'] < 1
    assert 0 < row['mass_recall'] <= 1


def test_untouched_layers_stay_and_numbers_differ_by_layer():
  model, batches = small.model('t5'), small.batches('t5', 4)
  made = compress(
      model, moefy(8, mass=0.7, choice='oracle', layers='.*/layers_1/.*'), batches
  )
  moe = made.model.config.moe
  assert moe.layer_experts == (1, 8, 1, 8)
  top_k = [row['top_k'] for row in made.report['layers']]
  assert moe.selection.choices[1::2] == tuple(top_k) and all(1 <= k < 8 for k in top_k)
  for row in made.report['layers']:
    assert row['mass_recall'] >= 0.7 - 1e-6
  want = model.params['encoder']['layers_0']['ffn']['wi']
  np.testing.assert_array_equal(
      made.model.params['encoder']['layers_0']['ffn']['experts']['wi'][0], want
  )


@pytest.mark.parametrize('rows, said', [
    ([{'chosen': 0.2, 'expert_size': 32}], '20 % of experts of 32 neurons are chosen'),
    ([{'chosen': 0.2, 'expert_size': 64}, {'chosen': 0.6, 'expert_size': 128}], '60 % of experts'),
    ([{'chosen': 0.4, 'expert_size': 128}], ''),
])
def test_it_says_where_nothing_is_saved(rows, said):
  """Above size / (size + 160) of the pairs: a sixth with experts of 32, 44 % with 128."""
  found = moefy(6).caution([{'active_neurons': 0.1, **row} for row in rows])
  assert found.startswith(said) and bool(found) == bool(said)


def test_the_share_of_a_dynamic_number_is_the_one_asked_for():
  model, batches = small.model('opt'), small.batches('opt', 4)
  for rule in ('cumulative', 'above'):
    made = compress(model, moefy(12, rule=rule, choice='oracle', share=0.4), batches)
    for row in made.report['layers']:
      assert 0.3 < row['neurons_run'] <= 0.4 + 1e-6, rule
    assert len(made.model.config.moe.selection.tau) == 2
  model, batches = small.model('llama'), small.batches('llama', 4)
  step = moefy(12, split='shared', shared=0.25, choice='representatives', rule='above', share=0.5)
  for row in compress(model, step, batches).report['layers']:
    assert 0.45 < row['neurons_run'] <= 0.5 + 1e-6


def test_untouched_layers_run_whatever_the_threshold():
  model, batches = small.model('t5'), small.batches('t5', 4)
  step = moefy(4, choice='norm', rule='above', tau=1e6, epochs=1, layers='.*/layers_1/.*')
  made = compress(model, step, batches, validation_batches=batches[:1])
  assert made.report['loss'] == pytest.approx(small.loss(made.model, 't5', batches[0]), rel=1e-5)


def test_split_layers_are_neither_split_again_nor_written_for_others(tmp_path):
  model, batches = small.model('t5'), small.batches('t5', 4)
  some = moefy(4, choice='cosine', layers='.*/layers_0/.*')
  with pytest.raises(UserError, match='split already'):
    compress(model, chain(some, moefy(4, choice='cosine', layers='.*/layers_1/.*')), batches)
  with pytest.raises(UserError, match='oracle'):
    compress(model, chain(moefy(4, choice='oracle'), quantize(4)), batches)
  split = compress(model, some, batches).model
  with pytest.raises(UserError, match='as_dense') as error:
    moejax.to_hf(split, tmp_path / 'hf')
  assert '\n' not in str(error.value) and not (tmp_path / 'hf').exists()


def test_a_model_with_labels_has_no_loss_of_words():
  config = dataclasses.replace(small.config_of('bert'), head='labels', labels=2)
  model, batches = Model.init(config, jax.random.key(0)), small.batches('bert', 2)
  result = compress(model, moefy(6, share=0.5, choice='cosine'), batches,
                    validation_batches=batches)
  assert result.report['loss'] is None and result.report['before']['loss'] is None
  first = np.zeros((4, 24), np.int32)
  first[:, 0] = 1
  told = [{**b, 'targets': first, 'weights': first.astype(np.float32)} for b in batches]
  whole = compress(model, moefy(6, share=1.0, choice='cosine'), batches, validation_batches=told)
  logits = np.concatenate([model.apply(b['tokens']).logits_btv[:, 0] for b in batches])
  want = -np.asarray(jax.nn.log_softmax(logits))[:, 1].mean()
  assert whole.report['loss'] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize('family', ('opt', 'bert'))
def test_fitting_lessens_the_error_that_is_told(family):
  """On the tokens it is fitted on it must: least squares from where it was."""
  errors = []
  for calibrate in (False, True):
    step = moefy(
        6, share=0.34, choice='cosine', calibrate=calibrate, ridge=1e-6, layers='.*/layers_0/ffn'
    )
    (row,) = compress(small.model(family), step, small.batches(family, 4)).report['layers']
    errors.append(row['relative_output_error'])
  assert 0 < errors[1] < 0.9 * errors[0]


@pytest.mark.long(but=('axes1',))
@pytest.mark.parametrize('axes', ((1, 2, 1), (1, 1, 2), (2, 2, 1)))
def test_a_split_model_is_the_same_on_a_mesh(axes):
  model, batches = small.model('opt'), small.batches('opt', 4)
  made = compress(model, moefy(4, share=0.5, choice='cosine', fill=True), batches).model
  tokens = batches[0]['tokens']
  want = np.asarray(made.apply(tokens).logits_btv)
  on = sharding.make_mesh(config.MeshConfig(**dict(zip(('data', 'expert', 'tensor'), axes))))
  placed = Model(made.config, sharding.place(made.params, on))
  got = np.asarray(placed.apply(tokens, mesh=on).logits_btv)
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_dtypes_stay_and_are_foreseen():
  model, batches = small.model('llama'), small.batches('llama', 4)
  half = Model(model.config, tree.cast_floats(model.params, jax.numpy.bfloat16))
  step = moefy(6, split='shared', shared=1 / 3, choice='representatives')
  made = compress(half, step, batches)
  flat = tree.flatten(made.model.params)
  kinds = {p.split('/')[3]: a.dtype.name for p, a in flat.items() if '/ffn/' in p}
  assert kinds == {'norm': 'bfloat16', 'experts': 'bfloat16', 'shared': 'bfloat16',
                   'router': 'float32'}
  foreseen = dry_run(half, step)
  assert foreseen['after']['stored_bytes'] == made.report['after']['stored_bytes']


def test_a_folder_is_made_resumed_and_read_again(tmp_path, monkeypatch):
  model, batches = small.model('llama'), small.batches('llama', 4)
  model.save(tmp_path / 'dense')
  step = moefy(expert_size=4, share=0.5, epochs=2)
  whole = compress(tmp_path / 'dense', step, batches, tmp_path / 'whole')
  split, calls = split_core.split, []

  def dies(*args, **kwargs):
    calls.append(args)
    if len(calls) == 2:
      raise RuntimeError
    return split(*args, **kwargs)

  monkeypatch.setattr(split_core, 'split', dies)
  with pytest.raises(RuntimeError):
    compress(tmp_path / 'dense', step, batches, tmp_path / 'again')
  compress(tmp_path / 'dense', step, batches, tmp_path / 'again')
  assert len(calls) == 3  # The first layer was not done twice.
  files = lambda folder: {
      p.name: p.read_bytes() for p in (tmp_path / folder).glob('*.safetensors')
  }
  assert files('whole') == files('again')
  read = Model.load(tmp_path / 'again')
  assert read.config.moe.num_experts == 6
  report = json.loads((tmp_path / 'whole' / 'report.json').read_text())
  assert report['after'] == {
      **account.of_source(store.Source(tmp_path / 'whole')), 'loss': report['after']['loss']
  }
  before, after = whole.report['before'], whole.report['after']
  router = 2 * (16 * 6 + 36)
  assert after['parameters'] == before['parameters'] + router
  assert after['active_parameters_per_token'] == (
      before['active_parameters_per_token'] + router - 2 * 3 * 16 * 12)


@pytest.mark.long
@pytest.mark.parametrize('family', ('t5_gated', 'opt'))
def test_one_after_the_other(family):
  model, batches = small.model(family), small.batches(family, 4)
  step = moefy(4, share=0.5, choice='cosine')
  split = compress(model, step, batches).model
  made = compress(model, chain(step, quantize(4)), batches, validation_batches=batches[:1])
  got = small.logits(made.model, family)
  assert np.abs(got - small.logits(split, family)).max() < 0.5 * np.abs(got).max()
  assert made.report['loss'] == pytest.approx(
      small.loss(made.model, family, batches[0]), rel=1e-4)
  foreseen = dry_run(model, chain(step, quantize(4)))
  assert foreseen['after']['stored_bytes'] == made.report['after']['stored_bytes']


@pytest.mark.parametrize('step', (prune('reap', experts=2), merge(2), prune_units(units=2)))
def test_experts_of_a_split_layer_are_not_left_out(step):
  model, batches = small.model('t5'), small.batches('t5', 1)
  split = compress(model, moefy(4, choice='cosine'), batches).model
  with pytest.raises(UserError, match='run fewer of them instead'):
    compress(split, step, batches)


def test_gradients_reach_the_chosen_experts_only():
  model, batches = small.model('t5'), small.batches('t5', 4)
  made = compress(model, moefy(6, top_k=1, choice='cosine'), batches).model
  batch = batches[0]

  def loss(params):
    out = Model(made.config, params).apply(batch['encoder_tokens'], batch['decoder_tokens'])
    return out.logits_btv.std(), out.routings

  grads, routings = jax.jit(jax.grad(loss, has_aux=True))(made.params)
  path = 'encoder/layers_1/ffn'
  own = grads['encoder']['layers_1']['ffn']['experts']['wo']
  used = np.bincount(np.asarray(routings[path].choice_mk).reshape(-1), minlength=6) > 0
  assert (np.abs(np.asarray(own)).max((1, 2)) > 0).tolist() == used.tolist()


def test_only_split_models_become_dense_again():
  with pytest.raises(UserError, match='no layers that were split'):
    as_dense(small.model('t5'))


def test_the_fewest_experts_that_hold_a_mass():
  scores = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]], np.float32)
  mass = np.array([[0.5, 0.4, 0.1], [0.0, 0.0, 0.0]], np.float32)
  assert [routers.least_k(scores, mass, t) for t in (0.5, 0.6, 0.9, 0.95, 1.0)] == [1, 2, 2, 3, 3]
  assert routers.least_k(scores, 0 * mass, 0.9) == 1


@pytest.mark.parametrize('make, message', [
    (lambda: moefy(), 'experts or expert_size'),
    (lambda: moefy(4, split='kmeans'), 'split'),
    (lambda: moefy(4, choice='mpl'), "did you mean 'mlp'"),
    (lambda: moefy(4, share=0.0), r'share = 0.0: in \(0, 1\]'),
    (lambda: moefy(4, rule='within', mass=0.9), 'mass is for'),
    (lambda: moefy(4, choice='representatives'), "needs split = 'shared'"),
    (lambda: moefy(4, rule='cumulative'), "not of 'mlp'"),
    (lambda: moefy(4, rule='above', top_k=2), "top_k is for rule = 'top'"),
    (lambda: moefy(4, weights='foo'), 'weights'),
    (lambda: moefy(4, calibrate=True, ridge=0.0), 'ridge = 0.0: above 0'),
])
def test_bad_settings_are_one_line(make, message):
  with pytest.raises(UserError, match=message) as error:
    make()
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('family, step, message', [
    ('t5', dict(experts=5), r'experts may be 1, 2, 3, 4, 6, 8, 12, 24'),
    ('t5', dict(expert_size=5), r'expert_size = 5 does not divide d_ff = 24: 1, 2, 3'),
    ('t5', dict(experts=4, top_k=5), 'top_k = 5 of 4'),
    ('opt', dict(experts=4, choice='average'), 'gated layers'),
    ('opt', dict(experts=4, split='shared', shared=0.25), 'gated by SiLU'),
    ('t5_gated', dict(experts=4, split='shared', shared=0.25), 'for decoders'),
    ('t5', dict(experts=1), '1 expert to choose from'),
    ('llama', dict(experts=4, layers='nothing'), 'takes no sparse layer'),
])
def test_what_does_not_fit_a_model_is_one_line(family, step, message):
  with pytest.raises(UserError, match=message) as error:
    compress(small.model(family), moefy(**step), small.batches(family, 1))
  assert '\n' not in str(error.value)
