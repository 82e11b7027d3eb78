"""Training encoders: masked words, labels, and hidden states of a teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config as config_lib
from moejax import model as model_lib
from moejax.errors import UserError
from moejax.model import Model
from moejax.train import loop, optim
from moejax.train import state as state_lib
from moejax.train import step as step_lib

pytestmark = pytest.mark.once

CONFIG = config_lib.EncoderConfig(
    vocab_size=64, d_model=32, d_head=16, d_ff=64, num_heads=2, num_kv_heads=2, num_layers=2,
    max_positions=32, initializer_std=0.1, dropout_rate=0.0, mask_id=2, eos_ids=(1,),
)
TEXT = 'one two three four five six seven eight nine ten eleven twelve. ' * 60


def experiment(tmp_path, config=CONFIG, **changes):
  (tmp_path / 'text.txt').write_text(TEXT)
  return config_lib.Experiment(
      model=dataclasses.replace(config, vocab_size=300),
      data=config_lib.DataConfig(
          train_files=(str(tmp_path / 'text.txt'),), valid_files=(str(tmp_path / 'text.txt'),),
          sequence_length=24,
      ),
      optim=config_lib.OptimConfig(learning_rate=5e-3, warmup_steps=5, schedule='constant'),
      train=config_lib.TrainConfig(
          steps=60, batch_size=8, log_every=10, eval_every=30, checkpoint_every=30, eval_batches=4,
      ), **changes,
  )


@pytest.mark.long
@pytest.mark.parametrize('scan', [False, True])
def test_masked_words_are_learned(scan, tmp_path):
  run = dataclasses.replace(experiment(tmp_path), model=dataclasses.replace(
      CONFIG, vocab_size=300, mask_id=None))
  run = dataclasses.replace(run, train=dataclasses.replace(run.train, scan_layers=scan))
  records = []
  result = loop.run(run, tmp_path / 'run', hooks=[records.append])
  first = next(r.metrics['cross_entropy'] for r in records if r.kind == 'train')
  assert result['eval_loss'] < 0.6 * first
  made = Model.load(result['model'])
  assert made.config == run.model
  assert made.apply(np.full((1, 4), 5, np.int32)).logits_btv.shape == (1, 4, 300)


def test_labels_are_learned_at_the_first_token():
  config = dataclasses.replace(CONFIG, head='labels', labels=3)
  run = config_lib.Experiment(
      model=config,
      optim=config_lib.OptimConfig(learning_rate=5e-3, warmup_steps=0, schedule='constant'),
      train=config_lib.TrainConfig(batch_size=16),
  )
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 16)
  tokens = rng.integers(10, 60, (16, 12)).astype(np.int32)
  tokens[:, 5] = 3 + labels
  first = np.zeros((16, 12), np.int32)
  first[:, 0] = 1
  batch = {
      'tokens': tokens, 'segments': np.ones_like(tokens), 'targets': first * labels[:, None],
      'positions': np.tile(np.arange(12, dtype=np.int32), (16, 1)),
      'weights': first.astype(np.float32),
  }
  optimizer = optim.make_optimizer(run.optim, 60, state_lib.abstract_params(run))
  params = model_lib.init_params(config, jax.random.key(0))
  state = state_lib.TrainState(
      step=jnp.int32(0), params=params, opt_state=optimizer.init(params),
      recent_losses=jnp.full((16,), jnp.nan),
  )
  step = jax.jit(lambda s: step_lib.train_step(run, optimizer, s, batch))
  for _ in range(60):
    state, metrics = step(state)
  assert float(metrics['accuracy']) == 1.0


@pytest.mark.long
def test_hidden_states_of_a_teacher_are_learned(tmp_path):
  config = dataclasses.replace(CONFIG, vocab_size=300, head='none', pooler=True)
  teacher = Model.init(config, jax.random.key(0))
  from moejax.data import tokenizer
  (tmp_path / 'tokenizer').mkdir()
  tokenizer.train([TEXT], 300, 0).save(tmp_path / 'tokenizer')
  teacher.save(tmp_path / 'teacher', tokenizer_from=tmp_path / 'tokenizer')
  run = experiment(tmp_path, config, init_from=str(tmp_path / 'teacher'))
  relu = dataclasses.replace(run.model, activation='relu')
  how = config_lib.DistillConfig(
      teacher=str(tmp_path / 'teacher'), task_weight=0.0, weight=0.0, hidden_weight=1.0
  )
  records = []
  run = dataclasses.replace(run, model=relu, distill=how)
  result = loop.run(run, tmp_path / 'run', hooks=[records.append])
  losses = [r.metrics['hidden'] for r in records if r.kind == 'train']
  assert losses[-1] < losses[0] - 0.5
  assert Model.load(result['model']).config.activation == 'relu'
  with pytest.raises(UserError, match='nothing to learn but hidden states'):
    loop.check(dataclasses.replace(run, distill=config_lib.DistillConfig()))
  labels = dataclasses.replace(config, head='labels', labels=2)
  with pytest.raises(UserError, match='texts alone have none'):
    loop.check(dataclasses.replace(run, model=labels))
