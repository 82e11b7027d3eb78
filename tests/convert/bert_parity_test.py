"""BERT from and to Hugging Face: the same hidden states, pooled tokens and logits."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax import convert
from moejax.config import EncoderConfig
from moejax.errors import UserError
from moejax.model import Model, apply_fn
from moejax.nn import encoder_head

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

ROOT = Path(__file__).parents[2]
CLASSES = {
    'none': 'BertModel', 'mlm': 'BertForMaskedLM', 'labels': 'BertForSequenceClassification',
}


def build(head, **changes):
  torch.manual_seed(0)
  fields = dict(
      vocab_size=83, hidden_size=32, num_attention_heads=4, intermediate_size=48,
      num_hidden_layers=2, max_position_embeddings=40, initializer_range=0.2, **changes,
  )
  fields |= {'num_labels': 5} if head == 'labels' else {}
  model = getattr(transformers, CLASSES[head])(transformers.BertConfig(**fields)).eval()
  with torch.no_grad():
    for name, p in model.named_parameters():
      if name.endswith('bias') or 'LayerNorm' in name:
        p.add_(torch.randn_like(p) * 0.2)
  return model


def inputs():
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 83, (3, 19)).astype(np.int32)
  mask = np.ones((3, 19), bool)
  mask[0, 12:], mask[2, 1:] = False, False
  return tokens, mask, rng.integers(0, 2, (3, 19)).astype(np.int32)


def theirs(hf, tokens, mask, types):
  with torch.no_grad():
    return hf(
        input_ids=torch.tensor(tokens, dtype=torch.long), token_type_ids=torch.tensor(types).long(),
        attention_mask=torch.tensor(mask).long(), output_hidden_states=True,
    )


def close(ours, theirs, mask=None):
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  if mask is not None:
    ours, theirs = ours[mask], theirs[mask]
  np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize('head', list(CLASSES))
@pytest.mark.parametrize('act', ['gelu', 'relu', 'gelu_new'])
def test_the_same_outputs(head, act, tmp_path):
  hf = build(head, hidden_act=act)
  hf.save_pretrained(tmp_path / 'theirs')
  model = convert.from_hf(tmp_path / 'theirs')
  assert isinstance(model.config, EncoderConfig) and model.config.head == head
  tokens, mask, types = inputs()
  want = theirs(hf, tokens, mask, types)
  got = apply_fn(
      model.config, model.params, tokens, valid_bt=mask, types_bt=types, keep_states=True
  )
  for ours, own in zip(got.states['encoder'], want.hidden_states[1:]):
    close(ours, own, mask)
  close(got.encoder_bsd, want.hidden_states[-1], mask)
  if head == 'none':
    assert got.logits_btv.shape == (3, 19, 0)
    close(encoder_head.pooled(model.params, got.encoder_bsd)[:, 0], want.pooler_output)
  elif head == 'labels':
    assert got.logits_btv.shape == (3, 19, 5)
    close(got.logits_btv[:, 0], want.logits)
  else:
    close(got.logits_btv, want.logits, mask)


@pytest.mark.parametrize('head', list(CLASSES))
def test_back_again(head, tmp_path):
  hf = build(head)
  hf.save_pretrained(tmp_path / 'theirs')
  model = convert.from_hf(tmp_path / 'theirs')
  convert.to_hf(model, tmp_path / 'ours')
  again, info = getattr(transformers, CLASSES[head]).from_pretrained(
      tmp_path / 'ours', output_loading_info=True
  )
  assert not info['missing_keys'] and not info['unexpected_keys']
  before, after = hf.state_dict(), again.state_dict()
  assert before.keys() == after.keys()
  for name, value in before.items():
    np.testing.assert_array_equal(value.numpy(), after[name].numpy(), err_msg=name)
  second = convert.from_hf(tmp_path / 'ours')
  assert second.config == model.config
  jax.tree.map(np.testing.assert_array_equal, second.params, model.params)
  model.save(tmp_path / 'moejax')
  assert Model.load(tmp_path / 'moejax').config == model.config


def test_pretraining_heads_and_old_buffers_are_left_out(tmp_path):
  torch.manual_seed(0)
  config = build('mlm').config
  hf = transformers.BertForPreTraining(config).eval()
  hf.save_pretrained(tmp_path / 'theirs')
  model = convert.from_hf(tmp_path / 'theirs')
  tokens, mask, types = inputs()
  with torch.no_grad():
    want = hf(
        input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long(),
        token_type_ids=torch.tensor(types).long(),
    ).prediction_logits
  got = apply_fn(model.config, model.params, tokens, valid_bt=mask, types_bt=types)
  close(got.logits_btv, want, mask)


@pytest.mark.parametrize('head', ['none', 'mlm'])
def test_names_of_the_first_files(head, tmp_path):
  import safetensors.torch
  hf = build(head)
  hf.save_pretrained(tmp_path / 'new')
  want = convert.from_hf(tmp_path / 'new')
  rename = lambda n: n.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
      'LayerNorm.bias', 'LayerNorm.beta')
  (tmp_path / 'old').mkdir()
  state = safetensors.torch.load_file(tmp_path / 'new' / 'model.safetensors')
  state['bert.embeddings.position_ids' if head == 'mlm' else 'embeddings.position_ids'] = (
      torch.arange(40)[None])
  safetensors.torch.save_file(
      {rename(n): a for n, a in state.items()}, tmp_path / 'old' / 'model.safetensors')
  (tmp_path / 'old' / 'config.json').write_text((tmp_path / 'new' / 'config.json').read_text())
  jax.tree.map(
      np.testing.assert_array_equal, convert.from_hf(tmp_path / 'old').params, want.params)


def test_padding_does_not_matter_and_order_does():
  config = EncoderConfig(
      vocab_size=83, d_model=32, d_head=8, d_ff=48, num_heads=4, num_kv_heads=4, num_layers=2,
      max_positions=40, initializer_std=0.3, head='labels', labels=3,
  )
  model = Model.init(config, jax.random.key(0))
  tokens, mask, _ = inputs()
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


def test_commands_that_make_no_sense_of_it(tmp_path):
  import subprocess
  import sys

  from moejax.data import tokenizer
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


def test_bad_configs(tmp_path):
  hf = build('none')
  hf.save_pretrained(tmp_path)
  file = tmp_path / 'config.json'
  values = json.loads(file.read_text())
  file.write_text(json.dumps({**values, 'position_embedding_type': 'relative_key'}))
  with pytest.raises(UserError, match='relative_key'):
    convert.from_hf(tmp_path)
  good = EncoderConfig(
      vocab_size=83, d_model=32, d_head=8, d_ff=48, num_heads=4, num_kv_heads=4, num_layers=2
  )
  for changes, words in (
      ({'head': 'mlms'}, "did you mean 'mlm'"), ({'labels': 3}, 'model.labels = 3'),
      ({'head': 'labels'}, 'model.labels = 0'), ({'mask_id': 83}, 'model.mask_id'),
  ):
    with pytest.raises(UserError, match=words):
      dataclasses.replace(good, **changes)
