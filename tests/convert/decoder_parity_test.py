"""Random Hugging Face decoders against ours, live: logits, router logits, and the way back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import generate
from moejax.convert import folder as convert
from moejax.model import apply_fn

pytestmark = pytest.mark.torch

BASE = dict(
    vocab_size=83, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None,
    bos_token_id=1, eos_token_id=2,
)
LONGROPE = dict(
    rope_type='longrope', original_max_position_embeddings=8, rope_theta=10000.0,
    short_factor=[1.0, 1.05, 1.1, 1.2], long_factor=[1.0, 1.6, 2.5, 4.0],
)
YARN = dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=16, rope_theta=1e4)
LLAMA3 = dict(
    rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16, rope_theta=500.0,
)
MOE = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=20)
# name: (class, config)
MODELS = {
    'phimoe': ('Phimoe', dict(
        num_local_experts=4, attention_bias=True, lm_head_bias=True, router_jitter_noise=0.3,
    )),
    'phimoe_window': ('Phimoe', dict(
        num_local_experts=3, sliding_window=5, router_jitter_noise=0.01,
        rope_parameters=dict(rope_type='default', rope_theta=500.0),
    )),
    'mixtral': ('Mixtral', dict(num_local_experts=4)),
    'mixtral_window_wide_heads': ('Mixtral', dict(
        num_local_experts=3, num_experts_per_tok=3, sliding_window=4, head_dim=12,
        eos_token_id=[2, 7], pad_token_id=0,
    )),
    'olmoe': ('Olmoe', dict(num_experts=6, num_experts_per_tok=3, num_key_value_heads=4)),
    'olmoe_clipped_normed': ('Olmoe', dict(
        num_experts=4, num_experts_per_tok=1, clip_qkv=0.4, norm_topk_prob=True,
    )),
    'qwen2_moe': ('Qwen2Moe', dict(shared_expert_intermediate_size=28, **MOE)),
    'qwen2_moe_mixed': ('Qwen2Moe', dict(
        num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3], use_sliding_window=True,
        sliding_window=5, max_window_layers=3, norm_topk_prob=True,
        shared_expert_intermediate_size=12, **MOE,
    )),
    'qwen3_moe': ('Qwen3Moe', dict(head_dim=10, norm_topk_prob=True, **MOE)),
    'qwen3_moe_yarn': ('Qwen3Moe', dict(
        num_hidden_layers=3, mlp_only_layers=[0], use_sliding_window=True, sliding_window=6,
        attention_bias=True, head_dim=8, rope_parameters=YARN, **MOE,
    )),
    'llama': ('Llama', dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    'llama_biased': ('Llama', dict(
        attention_bias=True, mlp_bias=True, head_dim=6, num_key_value_heads=1,
        rope_parameters=dict(rope_type='linear', factor=4.0, rope_theta=1e4),
    )),
    'mistral': ('Mistral', dict(sliding_window=5)),
    'qwen2': ('Qwen2', dict(
        num_hidden_layers=3, use_sliding_window=True, sliding_window=4, max_window_layers=1
    )),
    'qwen3': ('Qwen3', dict(head_dim=10)),
    'opt': ('OPT', dict(ffn_dim=40, word_embed_proj_dim=32, do_layer_norm_before=True)),
    'opt_no_bias_untied': ('OPT', dict(
        ffn_dim=40, word_embed_proj_dim=32, enable_bias=False, activation_function='gelu',
        tie_word_embeddings=False,
    )),
}


def build(name, **extra):
  import torch
  import transformers
  torch.manual_seed(sum(map(ord, name)))
  kind, own = MODELS[name]
  values = {**BASE, **own, **extra}
  if kind == 'OPT':
    values = {k: v for k, v in values.items() if k not in ('intermediate_size',
                                                          'num_key_value_heads')}
  config = getattr(transformers, f'{kind}Config')(**values)
  model = getattr(transformers, f'{kind}ForCausalLM')(config)
  with torch.no_grad():
    for path, p in model.named_parameters():
      scale = 0.3 if p.ndim == 1 else 2.0 * p.shape[-1] ** -0.5
      if 'norm' in path and p.ndim == 1:
        p.add_(torch.randn(p.shape) * 0.3)
      else:
        p.copy_(torch.randn(p.shape) * (0.5 if 'embed' in path else scale))
  return model.eval()


def tokens(seed=0, length=13):
  return np.random.default_rng(seed).integers(3, 83, (2, length))


def run_torch(model, ids, routers=False):
  import torch
  kwargs = dict(output_router_logits=True) if routers else {}
  kwargs['output_hidden_states'] = True
  with torch.no_grad():
    return model(input_ids=torch.tensor(ids), **kwargs)


def run_ours(model, ids):
  run = jax.jit(lambda p, x: apply_fn(model.config, p, x, keep_states=True))
  return run(model.params, jnp.asarray(ids))


def assert_close(ours, theirs):
  """Up to float32 rounding, which goes by the largest: sums cancel, in an order of each CPU."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  largest = np.abs(np.where(np.isfinite(theirs), theirs, 0)).max()
  np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5 * largest)


def reload(folder):
  import transformers
  model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
  assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys']
  return model.eval()


@pytest.mark.long(but=(
    'phimoe', 'mixtral_window_wide_heads', 'olmoe_clipped_normed', 'qwen2_moe_mixed',
    'qwen3_moe_yarn', 'llama_biased', 'mistral', 'qwen2', 'qwen3', 'opt', 'opt_no_bias_untied',
))
@pytest.mark.parametrize('name', MODELS)
def test_models_agree_both_ways(name, tmp_path):
  import torch
  hf = build(name)
  ids = tokens()
  moe = hasattr(hf.config, 'num_experts_per_tok')
  expected = run_torch(hf, ids, moe)
  hf.save_pretrained(tmp_path / 'theirs')
  model = convert.from_hf(tmp_path / 'theirs')
  output = run_ours(model, ids)
  assert_close(output.logits_btv, expected.logits)
  for ours, theirs in zip(output.states['decoder'], expected.hidden_states[1:], strict=True):
    size = theirs.abs().max()
    assert_close(ours / float(size), theirs / size)
  if moe:
    found = list(output.routings.values())
    assert len(found) == len(expected.router_logits) == len(model.config.sparse_layers())
    for routing, theirs in zip(found, expected.router_logits):
      assert_close(routing.logits_me, theirs)
  convert.to_hf(model, tmp_path / 'back')
  back = reload(tmp_path / 'back')
  ours, theirs = back.state_dict(), hf.state_dict()
  assert ours.keys() == theirs.keys()
  for key, value in theirs.items():
    assert torch.equal(ours[key], value), key
  assert_close(run_torch(back, tokens(5)).logits, run_torch(hf, tokens(5)).logits)
  again = convert.from_hf(tmp_path / 'back')
  assert again.config == model.config


@pytest.mark.parametrize('length', [8, 12])
def test_longrope_on_either_side_of_the_trained_length(length, tmp_path):
  """Llama's rope module has transformers' longrope without the defects of phimoe's."""
  hf = build('llama', rope_parameters=LONGROPE, tie_word_embeddings=False)
  hf.save_pretrained(tmp_path / 'theirs')
  model = convert.from_hf(tmp_path / 'theirs')
  ids = tokens(length=length)
  assert_close(run_ours(model, ids).logits_btv, run_torch(hf, ids).logits)
  assert model.config.rope.kind == 'longrope'


@pytest.mark.parametrize('name', ['phimoe', 'mixtral', 'olmoe', 'qwen2_moe'])
def test_fused_experts_and_names_of_memory(name, tmp_path):
  """A state dict as transformers 5 holds it: experts fused, Phi's router under another name."""
  import safetensors.torch
  hf = build(name)
  folder = tmp_path / 'fused'
  hf.config.save_pretrained(folder)
  state = {k: v.contiguous() for k, v in hf.state_dict().items()}
  assert any(k.endswith('gate_up_proj') for k in state)
  safetensors.torch.save_file(state, folder / 'model.safetensors')
  model = convert.from_hf(folder)
  assert_close(run_ours(model, tokens()).logits_btv, run_torch(hf, tokens()).logits)


def test_bare_models_and_older_configs(tmp_path):
  """Without the prefix 'model.', with rope_theta and rope_scaling, and buffers of old versions."""
  import safetensors.torch
  import torch
  hf = build('llama')
  hf.config.save_pretrained(tmp_path)
  config = json.loads((tmp_path / 'config.json').read_text())
  rope = config.pop('rope_parameters')
  config['rope_theta'] = rope.pop('rope_theta')
  config['rope_scaling'] = {**rope, 'type': rope.pop('rope_type')}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  state = {k.removeprefix('model.'): v.contiguous() for k, v in hf.model.state_dict().items()}
  state['layers.0.self_attn.rotary_emb.inv_freq'] = torch.zeros(4)
  safetensors.torch.save_file(state, tmp_path / 'model.safetensors')
  model = convert.from_hf(tmp_path)
  assert_close(run_ours(model, tokens()).logits_btv, run_torch(hf, tokens()).logits)


def test_grin_files_are_phimoe_by_another_name(tmp_path):
  hf = build('phimoe')
  hf.save_pretrained(tmp_path / 'theirs')
  config = json.loads((tmp_path / 'theirs' / 'config.json').read_text())
  config |= {'model_type': 'grinmoe', 'architectures': ['GRIN-MoE'], 'rope_theta': 10000.0,
             'auto_map': {'AutoModelForCausalLM': 'modeling_grinmoe.GRINMoEForCausalLM'}}
  del config['rope_parameters']
  (tmp_path / 'theirs' / 'config.json').write_text(json.dumps(config))
  model = convert.from_hf(tmp_path / 'theirs')
  assert model.config.family == 'grin' and model.config.rope.theta == 10000.0
  convert.to_hf(model, tmp_path / 'back')
  back = reload(tmp_path / 'back')
  assert_close(run_ours(model, tokens()).logits_btv, run_torch(back, tokens()).logits)


@pytest.mark.long(but=('phimoe', 'qwen3_moe_yarn', 'llama'))
@pytest.mark.parametrize('name', [
    'phimoe', 'mixtral_window_wide_heads', 'olmoe', 'qwen2_moe_mixed', 'qwen3_moe_yarn', 'llama',
    'opt',
])
def test_greedy_tokens_are_hugging_faces(name, tmp_path):
  """A batch of unequal prompts of ours, against transformers one by one."""
  import torch
  hf = build(name, eos_token_id=2, pad_token_id=0)
  hf.save_pretrained(tmp_path / 'theirs')
  model = convert.from_hf(tmp_path / 'theirs')
  prompts = [row[:n].tolist() for row, n in zip(tokens(3, 11).repeat(2, 0), (4, 11, 7))]
  made = generate.generate(model, prompts, max_new_tokens=9, stop_ids=(2,))
  for prompt, ours in zip(prompts, made.rows()):
    theirs = hf.generate(
        torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=2,
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
    )
    assert ours == theirs[0, len(prompt):].tolist()
  assert len({token for row in made.rows() for token in row}) > 3
