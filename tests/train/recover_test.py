"""Training what merging and pruning left, held to a teacher: losses, frozen parts, resume."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import flags
import moejax
from moejax import config as config_lib
from moejax import errors, sharding, tree, weights
from moejax.compress import compress, shares
from moejax.model import Model
from moejax.train import distill, loop, optim
from moejax.train import state as state_lib
from moejax.train import step as step_lib

pytestmark = pytest.mark.once
ROOT = Path(__file__).parents[2]


def batches(setup, count=2):
  return [jax.device_get(setup.batch(i)) for i in range(count)]


@pytest.fixture
def teacher(common):
  setup = common.setup(common.experiment())
  return setup, Model(setup.experiment.model, jax.tree.map(jnp.asarray, setup.params))


def student_of(teacher, step):
  setup, model = teacher
  return compress(model, step, batches(setup)).model


def run(experiment, student, teacher, batch, steps=3):
  mesh = sharding.make_mesh(experiment.mesh)
  optimizer = optim.make_optimizer(experiment.optim, 10, state_lib.abstract_params(experiment))
  places = state_lib.shardings(state_lib.abstract(experiment, optimizer), mesh)
  state = state_lib.init(experiment, optimizer, mesh, student.params)
  on_mesh = None if teacher is None else dataclasses.replace(
      teacher, params=jax.device_put(teacher.params, sharding.param_shardings(teacher.params, mesh))
  )
  step = step_lib.jit_train_step(experiment, optimizer, mesh, places, on_mesh)
  history = []
  for _ in range(steps):
    state, metrics = step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
    history.append({k: float(v) for k, v in metrics.items() if not np.ndim(v)})
  return state, history


def changed(experiment, model, **settings):
  sets = [f'{name.replace("__", ".")}={json.dumps(v)}' for name, v in settings.items()]
  return config_lib.apply_overrides(dataclasses.replace(experiment, model=model.config), sets)


@pytest.mark.long
def test_a_merged_model_trains_and_keeps_its_map(teacher):
  setup, model = teacher
  student = student_of(teacher, moejax.merge((1, 3)))
  experiment = changed(setup.experiment, student)
  state, history = run(experiment, student, None, batches(setup)[0], steps=6)
  assert history[-1]['cross_entropy'] < history[0]['cross_entropy']
  before, after = tree.flatten(student.params), tree.flatten(state.params)
  for path, leaf in after.items():
    if path.endswith('expert_map'):
      assert leaf.dtype == jnp.int32
      np.testing.assert_array_equal(np.asarray(leaf), np.asarray(before[path]))
    else:
      assert not np.array_equal(np.asarray(leaf), np.asarray(before[path])), path
  assert 'distillation' not in history[0]


@pytest.mark.long(but=('published-2-',))
@pytest.mark.parametrize('reduction, accumulate, form', (
    ('token', 2, ''), ('published', 2, ''), ('published', 1, 'mse'), ('published', 1, 'cosine'),
))
def test_the_loss_is_that_of_the_formula(teacher, reduction, accumulate, form):
  setup, model = teacher
  student = student_of(teacher, moejax.prune('reap', experts=2))
  experiment = changed(
      setup.experiment, student, distill__weight=0.3, distill__task_weight=0.7,
      distill__reduction=reduction, train__accumulate=accumulate, distill__teacher='given',
      distill__hidden_weight=0.5 if form else 0.0, distill__hidden_form=form or 'mse',
      model__moe__router_aux_loss_coef=0.0, model__moe__router_z_loss_coef=0.0,
  )
  batch = batches(setup)[0]
  _, history = run(experiment, student, model, batch, steps=1)
  mask = batch['encoder_tokens'] != experiment.model.pad_id
  outputs = [
      m.apply(batch['encoder_tokens'], batch['decoder_tokens'], encoder_mask=mask, keep_states=True)
      for m in (student, model)
  ]
  logits = [output.logits_btv for output in outputs]
  want = distill.logit_loss(*logits, batch['weights'], reduction=reduction)
  hidden = 0.0
  if form:
    hidden = float(distill.hidden_loss(*(list(o.states.values()) for o in outputs), form))
    assert history[0]['hidden'] == pytest.approx(hidden, rel=1e-4)
  assert history[0]['distillation'] == pytest.approx(float(want), rel=1e-4)
  assert history[0]['loss'] == pytest.approx(
      0.7 * history[0]['cross_entropy'] + 0.3 * float(want) + 0.5 * hidden, rel=1e-4
  )


def test_only_routers_learn(teacher):
  setup, model = teacher
  student = student_of(teacher, moejax.merge(2, router='slice', budget='uniform'))
  experiment = changed(
      setup.experiment, student, distill__weight=1.0, distill__task_weight=0.0,
      distill__temperature=1.0, distill__teacher='given', model__moe__router_aux_loss_coef=0.0,
      model__moe__router_z_loss_coef=0.0, optim__learning_rate=0.01,
      optim__learning_rate_rules=[['.*/router/.*', 1.0], ['.*', 0.0]],
  )
  state, history = run(experiment, student, model, batches(setup)[0], steps=8)
  assert history[-1]['distillation'] < history[0]['distillation']
  before = tree.flatten(student.params)
  for path, leaf in tree.flatten(state.params).items():
    same = np.array_equal(np.asarray(leaf), np.asarray(before[path]))
    assert same != ('/router/' in path), path


@pytest.mark.long
def test_sharded_it_is_the_same_run(teacher):
  setup, model = teacher
  student = student_of(teacher, moejax.merge((2, 4)))
  settings = dict(distill__teacher='given', distill__weight=1.0)
  one = changed(setup.experiment, student, **settings)
  many = changed(setup.experiment, student, mesh__data=2, mesh__expert=2, **settings)
  batch = batches(setup)[0]
  got = [run(e, student, model, batch, steps=2)[1] for e in (one, many)]
  for a, b in zip(*got):
    assert a['loss'] == pytest.approx(b['loss'], rel=2e-5)
    assert a['distillation'] == pytest.approx(b['distillation'], rel=2e-4)


CONFIG = '''
from moejax import config as c

def get_config():
  return c.Experiment(
      model=c.EncDecConfig(
          vocab_size=320, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1,
          num_decoder_layers=1, dropout_rate=0.1,
          moe=c.EncDecMoeConfig(num_experts=4, encoder_sparse_step=1, decoder_sparse_step=1)),
      data=c.DataConfig(train_files=({train!r},), encoder_length=24, num_sentinels=10),
      optim=c.OptimConfig(warmup_steps=2, learning_rate=0.01),
      mesh=c.MeshConfig(data=1),
      train=c.TrainConfig(steps=4, batch_size=8, log_every=1, checkpoint_every=0,
                          peak_flops_per_second=1e9))
'''


def first_model(tmp_path, settings=()):
  """The folder of a model trained for a few steps, and a batch for calibration."""
  rng = np.random.default_rng(0)
  words = ['union', 'state', 'the', 'of', 'people', 'year', 'congress', 'and', 'great', 'law']
  (tmp_path / 'text.txt').write_text(' '.join(rng.choice(words, 600)))
  (tmp_path / 'tiny.py').write_text(CONFIG.format(train=str(tmp_path / 'text.txt')))
  experiment = flags.load_config(str(tmp_path / 'tiny.py'), list(settings))
  loop.run(experiment, tmp_path / 'first', hooks=[])
  draw = lambda length: rng.integers(3, 300, (4, length))
  return tmp_path / 'first' / 'model', {
      'encoder_tokens': draw(16), 'decoder_tokens': draw(8), 'targets': draw(8),
      'weights': np.ones((4, 8), np.float32),
  }


@pytest.mark.long
def test_from_a_folder_through_the_command(tmp_path, monkeypatch):
  """Train, prune, recover: the manifest knows the texts and the teacher; a stopped run goes on."""
  monkeypatch.chdir(ROOT)
  whole, sample = first_model(tmp_path)
  compress(whole, moejax.prune('reap', experts=2), [sample], tmp_path / 'pruned')
  settings = ['train.steps=6', 'optim.warmup_steps=2', 'train.batch_size=8', 'mesh.data=1',
              'train.checkpoint_every=2', 'train.peak_flops_per_second=1e9', 'train.eval_every=0']
  settings += [f'low_rank.{field}' for field in (
      'rank=4', 'kept=0.25', 'warmup_steps=1', 'settle_steps=2'
  )]
  for kind in ('router', 'losparse'):
    experiment = flags.load_config(f'configs/recover.py:{kind}@{tmp_path / "pruned"}', settings)
    assert experiment.distill.teacher == str(whole)
    assert experiment.data.train_files == (str(tmp_path / 'text.txt'),)
    records = []
    result = loop.run(experiment, tmp_path / kind, hooks=[records.append])
    rows = [r for r in records if r.kind == 'train']
    assert rows and all(np.isfinite(r.metrics['distillation']) for r in rows)
    before, after = (tree.flatten(Model.load(f).params)
                     for f in (tmp_path / 'pruned', result['model']))
    for path, leaf in after.items():
      if isinstance(leaf, weights.LowRankSparse):
        assert kind == 'losparse' and leaf.shape == before[path].shape
        assert leaf.left.shape[2] == 4 and leaf.index.shape[1] < leaf.shape[2]
        continue
      same = np.array_equal(np.asarray(leaf), np.asarray(before[path]))
      assert same == (('/router/' in path) == (kind == 'losparse')), (kind, path)
  assert any(isinstance(leaf, weights.LowRankSparse) for leaf in after.values())
  asked = iter([False, False, True])
  cut = loop.run(experiment, tmp_path / 'cut', hooks=[], should_stop=lambda: next(asked, True))
  assert not cut['finished']
  for change, message in (
      ('low_rank.rank=3', 'low_rank.rank = 4'),
      ('optim.learning_rate_rules=[[".*", 1.0]]', r"keep \['\.\*/router/\.\*'\] as they are"),
  ):
    with pytest.raises(errors.UserError, match=message):
      loop.run(config_lib.apply_overrides(experiment, [change]), tmp_path / 'cut', hooks=[])
  loop.run(experiment, tmp_path / 'cut', hooks=[])
  files = [(tmp_path / name / 'model' / 'model.safetensors').read_bytes()
           for name in ('losparse', 'cut')]
  assert files[0] == files[1]


@pytest.mark.long
def test_a_split_model_from_a_folder(tmp_path, monkeypatch):
  """Train a dense model, split it, fine-tune: what each recipe leaves alone stays as it was."""
  monkeypatch.chdir(ROOT)
  whole, sample = first_model(tmp_path, ['model.family=t5', 'model.moe=null'])
  compress(whole, moejax.moefy(4, share=0.5, choice='cosine'), [sample], tmp_path / 'split')
  settings = ['train.steps=4', 'optim.warmup_steps=1', 'train.batch_size=8', 'mesh.data=1',
              'train.checkpoint_every=0', 'train.peak_flops_per_second=1e9', 'train.eval_every=0',
              'low_rank.rank=2']
  moved = {
      'outputs': lambda p: p.endswith('/experts/wo'), 'lora': lambda p: '/experts/' in p,
      'moebert': lambda p: '/router/' not in p,
  }
  before = tree.flatten(Model.load(tmp_path / 'split').params)
  for kind, moves in moved.items():
    experiment = flags.load_config(f'configs/recover.py:{kind}@{tmp_path / "split"}', settings)
    assert experiment.distill.teacher == str(whole)
    records = []
    result = loop.run(experiment, tmp_path / kind, hooks=[records.append])
    rows = [r.metrics for r in records if r.kind == 'train']
    assert all(np.isfinite(m['distillation']) and m['distillation'] > 0 for m in rows)
    assert all(('hidden' in m) == (kind == 'moebert') for m in rows)
    after = tree.flatten(Model.load(result['model']).params)
    assert after.keys() == before.keys()
    for path, leaf in after.items():
      same = np.array_equal(np.asarray(leaf), np.asarray(before[path]))
      assert same == (not moves(path)), (kind, path)
  how = shares.Shares(budget=0.5, measured=10, drawn=10, finalists=1)
  moejax.search_shares(tmp_path / 'split', [sample], how, tmp_path / 'shares')
  again = flags.load_config(f'configs/recover.py:full@{tmp_path / "shares"}', settings)
  assert again.distill.teacher == str(whole)
  with pytest.raises(errors.UserError, match='choose without gates'):
    flags.load_config(f'configs/recover.py:router@{tmp_path / "split"}', [])


@pytest.mark.parametrize('variant, message', (
    ('', 'say VARIANT@FOLDER'), ('fulll@runs', "did you mean 'full'"),
    ('full@nowhere', 'nowhere'),
))
def test_a_wrong_variant(variant, message, monkeypatch):
  monkeypatch.chdir(ROOT)
  with pytest.raises(errors.UserError, match=message):
    flags.load_config(f'configs/recover.py:{variant}', [])


def test_nothing_to_learn(teacher):
  setup, model = teacher
  with pytest.raises(errors.UserError, match='there is nothing to learn'):
    loop.check(changed(setup.experiment, model, distill__task_weight=0.0))


def test_published_settings(teacher, tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  setup, model = teacher
  model.save(tmp_path / 'model', provenance={'trained': {
      'experiment': config_lib.to_json(setup.experiment)}})
  run = flags.load_config(f'configs/recover.py:published@{tmp_path / "model"}', [])
  assert (run.distill.weight, run.distill.reduction, run.distill.temperature) == (
      0.2, 'published', 2.0)
  trained, _ = optim.split_trained(run.optim, model.params)
  assert not any('/router/' in path for path in tree.flatten(trained))
  assert run.model.moe.router_aux_loss_coef == run.model.moe.router_z_loss_coef == 0
  run = flags.load_config(f'configs/recover.py:lora@{tmp_path / "model"}', [])
  trained, _ = optim.split_trained(run.optim, state_lib.abstract_params(run))
  names = {path.rpartition('/')[2] for path in tree.flatten(trained) if '/router/' not in path}
  assert names == {'left', 'right'}


def test_a_teacher_of_other_words(teacher, tmp_path):
  setup, model = teacher
  other = dataclasses.replace(model.config, vocab_size=100)
  Model.init(other, jax.random.key(0)).save(tmp_path / 'other')
  experiment = changed(setup.experiment, model, distill__teacher=str(tmp_path / 'other'))
  with pytest.raises(errors.UserError, match='100 words'):
    loop.load_teacher(experiment, setup.mesh)
