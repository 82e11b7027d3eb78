"""Broken or hostile Hugging Face folders: one clear line each, exit code 2, nothing left behind."""

import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from moejax import safetensors_io
from moejax.convert import folder as convert
from moejax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent.parent


def edit(folder, **changes):
  file = folder / 'config.json'
  values = {**json.loads(file.read_text()), **changes}
  file.write_text(json.dumps({k: v for k, v in values.items() if v != 'REMOVED'}))


def edit_tensors(folder, change):
  tensors = {n: i.read().copy() for n, i in safetensors_io.read_folder(folder).items()}
  change(tensors)
  safetensors_io.write_folder(folder, iter(tensors.items()))


def overwrite(folder, keep):
  file = folder / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:keep])


def wrong_type(tensors):
  tensors['encoder.final_layer_norm.weight'] = np.ones(16, np.int8)


def set_nan(tensors):
  tensors['decoder.block.1.layer.2.mlp.experts.expert_2.wo.weight'][3, 4] = np.nan


CONFIG = {
    'unknown family': (dict(model_type='switch_transformer'), 'switch_transformers'),
    'a family we lack': (dict(model_type='mamba'), 'unknown model family'),
    'no family': (dict(model_type='REMOVED'), 'no model_type'),
    'unknown activation': (dict(dense_act_fn='gleu_new'), r'gleu_new.*gelu_new'),
    'unknown field': (dict(num_expert=8), r'num_expert.*did you mean .num_experts'),
    'architecture field': (dict(num_shared_experts=2), 'num_shared_experts'),
    'wrong type': (dict(d_model='16'), r"d_model = '16': expected int"),
    'wrong type, bool': (dict(num_heads=True), 'num_heads = True'),
    'null size': (dict(d_ff=None), 'd_ff = None'),
    'negative size': (dict(d_model=-16), 'd_model'),
    'half router': (dict(router_dtype='bfloat16'), r'router_dtype.*float32'),
    'quantized': (dict(quantization_config={'bits': 4}), 'quantization_config'),
    'decoder only': (dict(is_encoder_decoder=False), 'is_encoder_decoder'),
    'two ends': (dict(eos_token_id=[1, 2]), 'eos_token_id'),
    'wrong width': (dict(d_ff=25), r'has shape \(24, 16\), config.json wants \(25, 16\)'),
    'too many experts': (
        dict(num_experts=4), r'classifier.* has shape \(3, 16\), config.json wants \(4, 16\)'
    ),
    'too few experts': (
        dict(num_experts=2), r'classifier.* has shape \(3, 16\), config.json wants \(2, 16\)'
    ),
    'too many layers': (dict(num_layers=4), r'block\.3.* is missing'),
    'another sparse step': (dict(encoder_sparse_step=1), 'is missing'),
    'bias that is not there': (dict(router_bias=True), r'classifier\.bias.* is missing'),
    'untied without a head': (dict(tie_word_embeddings=False), r'lm_head\.weight.* is missing'),
}
FILES = {
    'no config': (lambda f: (f / 'config.json').unlink(), r'config\.json'),
    'empty config': (lambda f: (f / 'config.json').write_text(''), 'not valid JSON'),
    'no weights': (lambda f: (f / 'model.safetensors').unlink(), 'has no model.safetensors'),
    'misnamed weights': (
        lambda f: (f / 'model.safetensors').rename(f / 'modle.safetensors'), r'modle\.safetensors'
    ),
    'truncated weights': (lambda f: overwrite(f, -5), r'model\.safetensors is truncated'),
    'empty weights': (lambda f: overwrite(f, 0), 'no complete safetensors'),
    'NaN': (lambda f: edit_tensors(f, set_nan), r'expert_2\.wo.*NaN'),
    'integers': (lambda f: edit_tensors(f, wrong_type), r'final_layer_norm.*int8'),
}


def check_refused(folder, out, message):
  with pytest.raises(UserError, match=message) as error:
    convert.convert_folder(folder, out)
  text = str(error.value)
  assert '\n' not in text and str(folder) in text
  assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name]


@pytest.mark.parametrize('name', CONFIG)
def test_a_wrong_config(name, hf_folder, tmp_path):
  changes, message = CONFIG[name]
  edit(hf_folder, **changes)
  check_refused(hf_folder, tmp_path / 'out', message)


@pytest.mark.parametrize('name', FILES)
def test_wrong_files(name, hf_folder, tmp_path):
  damage, message = FILES[name]
  damage(hf_folder)
  check_refused(hf_folder, tmp_path / 'out', message)


def test_harmless_fields_are_passed_over(hf_folder, switch_model):
  edit(
      hf_folder, n_positions=512, output_past=True, task_specific_params={'x': {}}, num_beams=4,
      router_type='tokens_masked', transformers_version='4.25.0', feed_forward_proj='relu',
      is_gated_act=False, eos_token_id=[1], decoder_start_token_id=None,
  )
  assert convert.from_hf(hf_folder).config == switch_model.config


def test_the_source_is_never_written_to(hf_folder):
  with pytest.raises(UserError, match='is the source itself'):
    convert.convert_folder(hf_folder, hf_folder.parent / 'x' / '..' / 'hf')


def test_a_full_disk_while_converting(hf_folder, tmp_path):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
  try:
    check_full_disk(hf_folder, tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def check_full_disk(hf_folder, tmp_path):
  for format in convert.FORMATS:
    with pytest.raises(UserError, match=r'cannot write .*out') as error:
      convert.convert_folder(hf_folder, tmp_path / 'out', format=format)
    assert '\n' not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ['hf']


def test_export_refuses_what_transformers_cannot_run(switch_model, tmp_path):
  import dataclasses

  from moejax.model import Model
  gated = dataclasses.replace(switch_model.config, gated=True)
  with pytest.raises(UserError, match='gated'):
    convert.to_hf(Model(gated, switch_model.params), tmp_path / 'hf')
  wider = dataclasses.replace(switch_model.config, d_ff=25)
  with pytest.raises(UserError, match=r'ffn/wi. has shape \(16, 24\), its config wants \(16, 25\)'):
    convert.to_hf(Model(wider, switch_model.params), tmp_path / 'hf')
  fewer = {k: v for k, v in switch_model.params.items() if k != 'shared'}
  with pytest.raises(UserError, match=r'shared/embedding. of shape \(61, 16\) is missing'):
    convert.to_hf(Model(switch_model.config, fewer), tmp_path / 'hf')
  more = {**switch_model.params, 'lm_head': {'kernel': np.ones((16, 61), np.float32)}}
  with pytest.raises(UserError, match=r'lm_head/kernel. of shape \(16, 61\) has no place'):
    convert.to_hf(Model(switch_model.config, more), tmp_path / 'hf')
  assert list(tmp_path.iterdir()) == []


def run(*args, cwd=ROOT):
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  return subprocess.run(
      [sys.executable, '-m', 'experiments.convert', *map(str, args)],
      capture_output=True, text=True, cwd=cwd, env=environment, timeout=120,
  )


def test_the_command(hf_folder, tmp_path):
  (hf_folder / 'tokenizer.json').write_text('{}')
  done = run('--source', hf_folder, '--out', tmp_path / 'ours', '--dtype', 'bfloat16')
  assert done.returncode == 0, done.stderr
  infos = safetensors_io.read_folder(tmp_path / 'ours')
  assert {i.dtype for i in infos.values()} == {np.dtype(ml_dtypes.bfloat16)}
  assert (tmp_path / 'ours' / 'tokenizer.json').exists()
  again = run('--source', tmp_path / 'ours', '--out', tmp_path / 'back', '--format', 'hf')
  assert again.returncode == 0, again.stderr
  assert json.loads((tmp_path / 'back' / 'config.json').read_text())['dtype'] == 'bfloat16'


@pytest.mark.parametrize(
    'args, message',
    [
        (('--source', 'nowhere', '--out', 'x'), 'nowhere does not exist'),
        (('--sorce', 'x'), "did you mean 'source'"),
    ],
)
def test_the_command_fails_on_one_line(args, message, tmp_path):
  done = run(*args)
  assert done.returncode == 2 and done.stderr.startswith('error: ')
  assert message in done.stderr and done.stderr.count('\n') == 1


# PyTorch files.


class Evil:
  def __init__(self, file):
    self.file = file

  def __reduce__(self):
    return (pathlib.Path.touch, (self.file,))


@pytest.mark.torch
@pytest.mark.parametrize('zipped', [True, False])
def test_a_weight_file_that_executes_code(zipped, hf_folder, tmp_path):
  import torch
  (hf_folder / 'model.safetensors').unlink()
  owned = tmp_path / 'owned'
  torch.save(
      {'shared.weight': Evil(owned)}, hf_folder / 'pytorch_model.bin',
      _use_new_zipfile_serialization=zipped,
  )
  check_refused(hf_folder, tmp_path / 'out', r'pytorch_model\.bin holds more than tensors.*refused')
  assert not owned.exists()


@pytest.mark.torch
@pytest.mark.parametrize('case', ['truncated', 'garbage', 'empty', 'list', 'numbers', 'quantized'])
def test_broken_torch_files(case, hf_folder, tmp_path):
  import torch
  (hf_folder / 'model.safetensors').unlink()
  file = hf_folder / 'pytorch_model.bin'
  values = {
      'list': [torch.ones(2)], 'numbers': {'a': 3},
      'quantized': {'shared.weight': torch.ones(2, 3, dtype=torch.int8)},
  }
  torch.save(values.get(case, {'shared.weight': torch.ones(3)}), file)
  if case in ('truncated', 'garbage', 'empty'):
    data = {'truncated': file.read_bytes()[:-200], 'garbage': b'hello' * 99, 'empty': b''}[case]
    file.write_bytes(data)
  message = {'list': 'no plain dict', 'numbers': 'no plain dict', 'quantized': 'int8'}
  check_refused(hf_folder, tmp_path / 'out', message.get(case, 'truncated or no PyTorch'))


@pytest.mark.torch
def test_mixed_up_torch_shards(hf_folder, tmp_path):
  import torch
  tensors = {n: torch.tensor(i.read()) for n, i in safetensors_io.read_folder(hf_folder).items()}
  (hf_folder / 'model.safetensors').unlink()
  names = sorted(tensors)
  files = ['pytorch_model-00001-of-00002.bin', 'pytorch_model-00002-of-00002.bin']
  weight_map = {n: files[i % 2] for i, n in enumerate(names)}
  for i, file in enumerate(files):
    torch.save({n: tensors[n] for n in names[1 - i :: 2]}, hf_folder / file)
  (hf_folder / 'pytorch_model.bin.index.json').write_text(json.dumps({'weight_map': weight_map}))
  check_refused(hf_folder, tmp_path / 'out', 'mixed up')


@pytest.mark.torch
def test_views_and_shared_storages_of_torch_files(tmp_path):
  """Transposed, offset and shared tensors are read where they lie."""
  import torch

  from moejax.convert import checkpoint
  base = torch.arange(24.0).reshape(4, 6)
  values = {
      'whole': base, 'again': base, 'turned': base.t(), 'rows': base[1:3], 'columns': base[:, 2:5],
      'none': torch.zeros(0, 3), 'half': base.half().t(), 'brain': base.bfloat16()[2],
  }
  torch.save(values, tmp_path / 'x.bin')
  infos = checkpoint.read_bin(tmp_path / 'x.bin')
  for name, tensor in values.items():
    array = infos[name].read()
    assert array.dtype.name == str(tensor.dtype).removeprefix('torch.')
    np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy())


def test_a_dtype_that_is_none_of_weights(hf_folder, tmp_path):
  with pytest.raises(UserError, match="dtype = 'int8': one of float32, bfloat16, float16"):
    convert.from_hf(hf_folder, dtype='int8')
  with pytest.raises(UserError, match='dtype = '):
    convert.to_hf(convert.from_hf(hf_folder), tmp_path / 'x', dtype=np.int32)


def test_padding_that_experts_skip_survives_the_way_there_and_back(switch_model, tmp_path):
  moe = dataclasses.replace(switch_model.config.moe, router_ignore_padding_tokens=True)
  config = dataclasses.replace(switch_model.config, moe=moe)
  convert.to_hf(dataclasses.replace(switch_model, config=config), tmp_path / 'hf')
  assert convert.from_hf(tmp_path / 'hf').config == config
