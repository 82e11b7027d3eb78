"""Encoders: what they see, what their settings may be, and commands that have no use for them."""

import dataclasses
import json
from pathlib import Path
import subprocess
import sys

import jax
import numpy as np
import pytest

from moejax.config import EncoderConfig
from moejax.data import tokenizer
from moejax.errors import UserError
from moejax.model import Model

ROOT = Path(__file__).parents[2]


def inputs():
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 83, (3, 19)).astype(np.int32)
  mask = np.ones((3, 19), bool)
  mask[0, 12:], mask[2, 1:] = False, False
  return tokens, mask


def test_padding_does_not_matter_and_order_does():
  config = EncoderConfig(
      vocab_size=83, d_model=32, d_head=8, d_ff=48, num_heads=4, num_kv_heads=4, num_layers=2,
      max_positions=40, initializer_std=0.3, head='labels', labels=3,
  )
  model = Model.init(config, jax.random.key(0))
  tokens, mask = inputs()
  got = model.apply(tokens, valid_bt=mask).logits_btv
  other = np.where(mask, tokens, 7)
  np.testing.assert_allclose(
      np.asarray(model.apply(other, valid_bt=mask).logits_btv)[mask], np.asarray(got)[mask],
      atol=1e-5,
  )
  alone = model.apply(tokens[:1, :12]).logits_btv
  np.testing.assert_allclose(alone[0, 0], got[0, 0], atol=1e-5)
  # A token behind is seen.
  changed = tokens.copy()
  changed[1, -1] = changed[1, -1] % 80 + 1
  assert np.abs(np.asarray(model.apply(changed).logits_btv - got)[1, 0]).max() > 1e-4


@pytest.mark.long
def test_commands_that_make_no_sense_of_it(tmp_path):

  config = EncoderConfig(
      vocab_size=300, d_model=32, d_head=8, d_ff=48, num_heads=4, num_kv_heads=4, num_layers=2,
      eos_ids=(1,),
  )
  for head in ('mlm', 'none'):
    folder = tmp_path / head
    made = dataclasses.replace(config, head=head, pooler=head == 'none')
    Model.init(made, jax.random.key(0)).save(folder)
    tokenizer.train(['the state of the union '] * 200, 300, 1).save(folder)
  (tmp_path / 'text.txt').write_text('the state of the union ' * 400)
  text, short = str(tmp_path / 'text.txt'), ('--sample_length', '32')
  for command, words in (
      (('generate', '--model', tmp_path / 'mlm', '--prompt', 'the'), 'writes no text'),
      (('evaluate', '--model', tmp_path / 'none', '--data', text, *short), "has head 'none'"),
      (('evaluate', '--model', tmp_path / 'mlm', '--data', text, '--bigram', text, *short),
       'bigrams are no measure'),
  ):
    done = subprocess.run(
        [sys.executable, '-m', f'experiments.{command[0]}', *map(str, command[1:])], cwd=ROOT,
        capture_output=True, text=True, check=False,
    )
    assert done.returncode == 2 and words in done.stderr, done.stderr
  done = subprocess.run(
      [sys.executable, '-m', 'experiments.evaluate', '--model', str(tmp_path / 'mlm'), '--data',
       text, *short, '--examples', '1'], cwd=ROOT, capture_output=True, text=True, check=False,
  )
  assert done.returncode == 0, done.stderr
  (example,) = json.loads(done.stdout)['examples']
  assert len(example['tokens']) == 32 > len(example['targets'])


def test_bad_configs():
  good = EncoderConfig(
      vocab_size=83, d_model=32, d_head=8, d_ff=48, num_heads=4, num_kv_heads=4, num_layers=2
  )
  for changes, words in (
      ({'head': 'mlms'}, "did you mean 'mlm'"), ({'labels': 3}, 'model.labels = 3'),
      ({'head': 'labels'}, 'model.labels = 0'), ({'mask_id': 83}, 'model.mask_id'),
      ({'norm': 'rms'}, "model.norm = 'rms': an encoder has 'layer'"),
      ({'head_bias': True}, 'model.head_bias'), ({'position_offset': 2}, 'model.position_offset'),
  ):
    with pytest.raises(UserError, match=words):
      dataclasses.replace(good, **changes)
