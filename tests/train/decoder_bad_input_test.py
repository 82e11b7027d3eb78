"""Mistakes in a decoder's run end in one line before anything is allocated or written."""

import pathlib

import pytest

from experiments import flags
from moejax import errors
from moejax.data import tokenizer
from moejax.train import loop

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'grin_tiny.py'


@pytest.mark.parametrize('changes, said', [
    (['model.family="gpt"'], r"family = 'gpt': one of"),
    (['moe.top_k=9'], r'moe\.top_k = 9: at most moe\.num_experts = 8'),
    (['moe.router="switch"'], r"moe\.top_k = 2: router 'switch' chooses one expert"),
    (['moe.router="sparsmixer_v2"'], r"moe\.router = 'sparsmixer_v2'.*did you mean"),
    (['mesh.expert=3', 'mesh.data=1'], r'train\.batch_size = 8 must be a multiple'),
    (['mesh.expert=3', 'train.batch_size=6', 'mesh.data=1'],
     r'moe\.num_experts = 8 does not divide over mesh\.expert = 3'),
    (['mesh.data=64', 'train.batch_size=64'], r'needs 64 devices, found'),
    (['mesh.pipeline=2', 'mesh.data=1'], r'mesh\.pipeline = 2 needs stacked layers'),
    (['mesh.pipeline=3', 'train.scan_layers=true', 'mesh.data=1', 'train.batch_size=18'],
     r'4 layers in 4 blocks of 1 do not divide over mesh axis pipeline = 3'),
    (['train.on_spike="retry"'], r"train\.on_spike = 'retry'"),
    (['model.num_kv_heads=3'], r'num_kv_heads'),
    (['data.sequence_length=512'], r'sequence_length = 512 is over the context'),
])
def test_one_line_before_anything_is_written(changes, said, tmp_path):
  with pytest.raises(errors.UserError, match=said) as caught:
    experiment = flags.load_config(str(CONFIG), changes)
    loop.run(experiment, tmp_path / 'run', hooks=[])
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'run').exists()


def test_a_pipeline_is_for_decoders(tmp_path):
  config = CONFIG.with_name('sotu_switch16.py')
  changes = ['mesh.pipeline=2', 'mesh.data=1', 'train.scan_layers=true']
  with pytest.raises(errors.UserError, match=r'mesh\.pipeline = 2 is for decoders: set it to 1'):
    loop.run(flags.load_config(str(config), changes), tmp_path / 'run', hooks=[])
  assert not (tmp_path / 'run').exists()


def test_a_variant_that_is_not_there(tmp_path):
  with pytest.raises(errors.UserError, match=r"no variant 'grinn' \(did you mean 'grin'\?\)"):
    flags.load_config(f'{CONFIG}:grinn')


def test_a_tokenizer_of_another_vocabulary(tmp_path):
  tokenizer.train(['x'], 300, 0).save(tmp_path)
  experiment = flags.load_config(str(CONFIG), [f'data.tokenizer={tmp_path}'])
  with pytest.raises(errors.UserError, match=r'tokenizer has 300 ids, model\.vocab_size is 2048'):
    loop.run(experiment, tmp_path / 'run', hooks=[])
