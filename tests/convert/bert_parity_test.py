"""BERT from and to Hugging Face: the same hidden states, pooled tokens and logits."""

import json

import jax
import numpy as np
import pytest

from moejax import convert
from moejax.config import EncoderConfig
from moejax.errors import UserError
from moejax.model import Model, apply_fn
from moejax.nn import encoder_head

pytestmark = pytest.mark.torch

CLASSES = {
    'none': 'BertModel', 'mlm': 'BertForMaskedLM', 'labels': 'BertForSequenceClassification',
}


def build(head, **changes):
  import torch
  import transformers
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
  import torch
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
  import transformers
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
  import torch
  import transformers
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
  import torch
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


def test_bad_configs(tmp_path):
  hf = build('none')
  hf.save_pretrained(tmp_path)
  file = tmp_path / 'config.json'
  values = json.loads(file.read_text())
  file.write_text(json.dumps({**values, 'position_embedding_type': 'relative_key'}))
  with pytest.raises(UserError, match='relative_key'):
    convert.from_hf(tmp_path)
