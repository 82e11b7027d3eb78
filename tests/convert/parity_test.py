"""Random Hugging Face models against ours, live: logits, router logits, drops, and the way back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import generate
from moejax.convert import folder as convert
from moejax.model import Model, apply_fn

pytestmark = pytest.mark.torch

BASE = dict(
    vocab_size=71, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
    decoder_start_token_id=0, relative_attention_num_buckets=8, relative_attention_max_distance=20,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
)
SWITCH = {
    'every_second': dict(
        num_layers=4, num_decoder_layers=4, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2
    ),
    'all_sparse': dict(num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, num_experts=3),
    'untied': dict(tie_word_embeddings=False),
    'narrow_heads': dict(d_kv=5, num_heads=3, num_layers=3, dense_act_fn='swish'),
    'one_expert': dict(num_experts=1),
    'capacity_drops': dict(
        num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, num_experts=4, expert_capacity=2
    ),
    'router_bias': dict(router_bias=True, num_experts=5, dense_act_fn='gelu'),
    'odd_steps': dict(num_layers=7, num_decoder_layers=3, num_sparse_encoder_layers=2),
    'asked_for_none': dict(num_layers=3, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0),
    'really_none': dict(num_sparse_encoder_layers=9, num_sparse_decoder_layers=9),
    'one_layer': dict(num_layers=1, num_decoder_layers=1, num_sparse_encoder_layers=0),
}
T5_BASE = {k: v for k, v in BASE.items() if 'sparse' not in k}
T5 = {
    'v1_0': dict(),
    'v1_1': dict(feed_forward_proj='gated-gelu', tie_word_embeddings=False),
    'v1_1_head_is_embedding': dict(feed_forward_proj='gated-gelu', tie_word_embeddings=False),
    'gated_silu_short_decoder': dict(feed_forward_proj='gated-silu', num_decoder_layers=2),
    'plain_gelu': dict(feed_forward_proj='gelu', d_kv=7, num_heads=3),
}


def build(family, name, **extra):
  import torch
  import transformers
  torch.manual_seed(sum(map(ord, name)))
  if family == 'switch':
    config = transformers.SwitchTransformersConfig(**{**BASE, **SWITCH[name], **extra})
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    # Untied models of transformers 5 start with three embeddings; published ones have one.
    model.encoder.embed_tokens.weight = model.decoder.embed_tokens.weight = model.shared.weight
  else:
    config = transformers.T5Config(**{**T5_BASE, **T5[name], **extra})
    model = transformers.T5ForConditionalGeneration(config)
    if name == 'v1_1':
      model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape))
    if name == 'v1_1_head_is_embedding':
      model.shared.weight.data.mul_(model.config.d_model**-0.5)  # keeps the logits around 1
  with torch.no_grad():
    for path, p in model.named_parameters():
      if 'layer_norm' in path or 'bias' in path:
        p.add_(torch.randn(p.shape) * 0.3)
      if 'SelfAttention.q' in path:
        p.mul_(2.0)
      if 'lm_head' in path or 'classifier' in path:
        p.mul_(model.config.d_model**-0.5)
  return model.eval()


def reload(folder):
  import transformers
  model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(
      folder, output_loading_info=True
  )
  assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys']
  return model.eval()


def inputs(seed=0, lengths=(9, 14)):
  rng = np.random.default_rng(seed)
  source = rng.integers(2, 71, (2, lengths[1]))
  mask = np.arange(lengths[1]) < np.array(lengths)[:, None]
  source[~mask] = 0
  return source, mask, rng.integers(2, 71, (2, 7))


def run_torch(model, source, mask, target, routers=False):
  import torch
  kwargs = dict(output_router_logits=True) if routers else {}
  with torch.no_grad():
    return model(
        input_ids=torch.tensor(source), attention_mask=torch.tensor(mask).long(),
        decoder_input_ids=torch.tensor(target), **kwargs,
    )


def run_ours(model, source, mask, target):
  @jax.jit
  def run(params, source, mask, target):
    return apply_fn(model.config, params, source, target, encoder_mask=mask)

  return run(model.params, jnp.asarray(source, jnp.int32), jnp.asarray(mask), jnp.asarray(target))


def assert_close(ours, theirs):
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def check_both_ways(hf, tmp_path, save=None, routers=False, **to_hf):
  source, mask, target = inputs()
  expected = run_torch(hf, source, mask, target, routers)
  (save or hf.save_pretrained)(tmp_path / 'theirs')
  model = convert.from_hf(tmp_path / 'theirs')
  output = run_ours(model, source, mask, target)
  assert_close(output.logits_btv, expected.logits.numpy())
  assert_close(output.encoder_bsd, expected.encoder_last_hidden_state.numpy())
  convert.to_hf(model, tmp_path / 'back', **to_hf)
  check_same(hf, reload(tmp_path / 'back'))
  return model, output, expected


def check_same(hf, back):
  """The same weights bit by bit, tied alike, and the same logits.

  Torch's products round by where a matrix lies in memory: logits are not compared exactly.
  """
  import torch
  ours, theirs = back.state_dict(), hf.state_dict()
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name
  expected, got = (run_torch(m, *inputs(5)).logits.float().numpy() for m in (hf, back))
  assert_close(got, expected)


def check_routers(model, output, expected):
  for stack, logits in (
      ('encoder', expected.encoder_router_logits), ('decoder', expected.decoder_router_logits)
  ):
    layers = model.config.sparse_layers(stack)
    assert len(logits or ()) == len(layers)
    for i, theirs in zip(layers, logits or ()):
      routing = output.routings[f'{stack}/layers_{i}/ffn']
      assert_close(routing.logits_me, theirs.numpy().reshape(routing.logits_me.shape))


@pytest.mark.long(but=(
    'every_second', 'all_sparse', 'untied', 'capacity_drops', 'router_bias', 'odd_steps',
    'one_expert',
))
@pytest.mark.parametrize('name', SWITCH)
def test_switch_models_agree_both_ways(name, tmp_path):
  hf = build('switch', name)
  sparse = any('router' in n for n, _ in hf.named_parameters())
  model, output, expected = check_both_ways(hf, tmp_path, routers=sparse)
  if sparse:
    check_routers(model, output, expected)
  if name == 'capacity_drops':
    dropped = sum(int((~r.keep_mk).sum()) for r in output.routings.values())
    assert dropped > 10


@pytest.mark.parametrize('name', T5)
def test_t5_models_agree_both_ways(name, tmp_path):
  model, _, _ = check_both_ways(build('t5', name), tmp_path)
  assert model.config.tie_embeddings == (not name.startswith('v1_1'))


def test_published_v1_1_layout_of_transformers_4(tmp_path):
  """There `tie_word_embeddings` is false and no `scale_decoder_outputs` is written."""
  hf = build('t5', 'v1_1')

  def save(folder):
    hf.save_pretrained(folder)
    config = json.loads((folder / 'config.json').read_text())
    for name in ('scale_decoder_outputs', 'dense_act_fn', 'is_gated_act'):
      del config[name]
    config |= {'tie_word_embeddings': False, 'n_positions': 512, 'output_past': True}
    (folder / 'config.json').write_text(json.dumps(config))

  model, _, _ = check_both_ways(hf, tmp_path, save)
  assert not model.config.tie_embeddings and model.config.activation == 'gelu_new'


@pytest.mark.long(but=(
    'bin-switch-every_second', 'old_bin-switch-untied', 'sharded_bin-t5-v1_1',
    'sharded_safetensors-switch-every_second', 'prefixed-switch-untied', 'old_bin-t5-v1_1',
))
@pytest.mark.parametrize(
    'family, name', [('switch', 'every_second'), ('switch', 'untied'), ('t5', 'v1_1')]
)
@pytest.mark.parametrize(
    'layout', ['bin', 'old_bin', 'sharded_bin', 'sharded_safetensors', 'prefixed']
)
def test_file_layouts(family, name, layout, tmp_path):
  """Tied matrices once or under all their names, T5's unused bias, each kind of file."""
  import torch
  hf = build(family, name)

  unused = 'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'

  def save(folder):
    hf.save_pretrained(folder, max_shard_size='60KB' if layout == 'sharded_safetensors' else '50GB')
    if layout == 'sharded_safetensors':
      assert len(list(folder.glob('*.safetensors'))) > 3
      return
    (folder / 'model.safetensors').unlink()
    state = dict(hf.state_dict())
    if family == 't5':
      state[unused] = torch.ones(8, 4)
    if layout == 'prefixed':
      state = {f'module.{key}': value for key, value in state.items()}
    if layout != 'sharded_bin':
      torch.save(
          state, folder / 'pytorch_model.bin',
          _use_new_zipfile_serialization=layout != 'old_bin',
      )
      return
    keys = sorted(state)
    parts = [keys[0::2], keys[1::2]]
    weight_map = {}
    for i, part in enumerate(parts):
      file = f'pytorch_model-{i + 1:05d}-of-00002.bin'
      torch.save({key: state[key] for key in part}, folder / file)
      weight_map |= dict.fromkeys(part, file)
    index = {'metadata': {'total_size': 1}, 'weight_map': weight_map}
    (folder / 'pytorch_model.bin.index.json').write_text(json.dumps(index))

  save(tmp_path / 'theirs')
  convert.to_hf(convert.from_hf(tmp_path / 'theirs'), tmp_path / 'back')
  check_same(hf, reload(tmp_path / 'back'))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_types_keep_every_bit(dtype, tmp_path):
  import torch
  hf = build('switch', 'every_second').to(getattr(torch, dtype))
  hf.save_pretrained(tmp_path / 'theirs')
  model = convert.from_hf(tmp_path / 'theirs')
  assert model.params['encoder']['layers_1']['ffn']['experts']['wi'].dtype == jnp.dtype(dtype)
  convert.to_hf(model, tmp_path / 'back')
  check_same(hf, reload(tmp_path / 'back'))


def test_through_a_moejax_folder_and_back(tmp_path):
  hf = build('switch', 'every_second')
  hf.save_pretrained(tmp_path / 'theirs')
  convert.convert_folder(tmp_path / 'theirs', tmp_path / 'ours')
  convert.convert_folder(tmp_path / 'ours', tmp_path / 'back')
  source, mask, target = inputs(3)
  expected = run_torch(hf, source, mask, target).logits.numpy()
  assert_close(run_ours(Model.load(tmp_path / 'ours'), source, mask, target).logits_btv, expected)
  check_same(hf, reload(tmp_path / 'back'))


def test_no_capacity_survives_the_way_to_hugging_face(switch_model, tmp_path):
  import dataclasses
  config = switch_model.config
  dropless = dataclasses.replace(config, moe=dataclasses.replace(config.moe, expert_capacity=None))
  model = Model(dropless, switch_model.params)
  convert.to_hf(model, tmp_path / 'hf')
  assert convert.from_hf(tmp_path / 'hf').config == dropless
  rng = np.random.default_rng(0)
  source, target = rng.integers(2, 61, (2, 40)), rng.integers(2, 61, (2, 30))
  mask = np.ones_like(source, bool)
  expected = run_torch(reload(tmp_path / 'hf'), source, mask, target).logits.numpy()
  assert_close(run_ours(model, source, mask, target).logits_btv, expected)


def test_untied_switch_with_three_embeddings_is_refused(tmp_path):
  import transformers

  from moejax.errors import UserError
  config = transformers.SwitchTransformersConfig(**BASE, tie_word_embeddings=False)
  transformers.SwitchTransformersForConditionalGeneration(config).save_pretrained(tmp_path / 'hf')
  with pytest.raises(UserError, match=r'encoder\.embed_tokens.* differs from .shared\.weight'):
    convert.from_hf(tmp_path / 'hf')


def test_the_safetensors_library_reads_what_we_write(tmp_path):
  """The same names as transformers writes, and hardly more bytes than the weights have."""
  import safetensors
  hf = build('switch', 'all_sparse')
  hf.save_pretrained(tmp_path / 'theirs')
  convert.to_hf(convert.from_hf(tmp_path / 'theirs'), tmp_path / 'back')
  theirs, back = (tmp_path / f / 'model.safetensors' for f in ('theirs', 'back'))
  with safetensors.safe_open(theirs, 'np') as a, safetensors.safe_open(back, 'np') as b:
    assert set(a.keys()) == set(b.keys())
    for name in a.keys():  # noqa: SIM118
      assert np.array_equal(a.get_tensor(name), b.get_tensor(name)), name
  assert back.stat().st_size < theirs.stat().st_size + 60 * len(hf.state_dict())


@pytest.mark.long(but=('t5-v1_1',))
@pytest.mark.parametrize('family, name', [('switch', 'every_second'), ('t5', 'v1_1')])
def test_greedy_tokens_are_hugging_faces(family, name, tmp_path):
  """A batch of unequal prompts of ours, against transformers one by one."""
  import torch
  hf = build(family, name)
  hf.save_pretrained(tmp_path / 'theirs')
  model = convert.from_hf(tmp_path / 'theirs')
  prompts = [row.tolist() for row in np.split(inputs()[0][0][:9], [2, 6])]
  made = generate.generate(model, prompts, max_new_tokens=8, stop_ids=(1,))
  for prompt, ours in zip(prompts, made.rows()):
    theirs = hf.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=1)
    assert ours == theirs[0, 1:].tolist()
