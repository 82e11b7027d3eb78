"""A compressed model leaves for Hugging Face as the dense weights it stands for."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moejax import safetensors_io, store, tree, weights
from moejax.convert import folder as convert
from moejax.model import Model

WI = 'encoder/layers_1/ffn/experts/wi'
WO = 'encoder/layers_1/ffn/experts/wo'
DENSE = 'encoder/layers_0/ffn/wi'


def packed(shape, bits):
  """`shape` is ours, [e, d, f] or [d, f]; the codec's rows are outputs."""
  rng = np.random.default_rng(bits)
  rows = (*shape[:-2], shape[-1])
  symbols = rng.integers(0, 1 << bits, (*rows, shape[-2]))
  scale = rng.uniform(0.1, 1.0, rows).astype(np.float32)
  return weights.Packed.from_symbols(symbols, scale, np.full(rows, 1.5, np.float32), bits=bits)


def compressed(model):
  params = model.params
  for path, bits in ((WI, 2), (WO, 4), (DENSE, 3)):
    params = tree.replace(params, path, packed(tree.get(params, path).shape, bits))
  return Model(model.config, params)


def test_nodes_are_written_dense(switch_model, tmp_path):
  model = compressed(switch_model)
  convert.to_hf(model, tmp_path / 'hf')
  back = tree.flatten(convert.from_hf(tmp_path / 'hf').params)
  for path, leaf in tree.flatten(model.params).items():
    expected = leaf.dense(jnp.float32) if isinstance(leaf, weights.WeightNode) else leaf
    np.testing.assert_array_equal(back[path], expected, err_msg=path)
  wi = safetensors_io.read_folder(tmp_path / 'hf')[
      'encoder.block.1.layer.1.mlp.experts.expert_2.wi.weight'
  ].read()
  np.testing.assert_array_equal(wi, np.asarray(model.params['encoder']['layers_1']['ffn'][
      'experts']['wi'].expert(2, jnp.float32)).T)


def test_from_a_folder_and_in_another_type(switch_model, tmp_path):
  model = compressed(switch_model)
  model.save(tmp_path / 'ours', provenance={'how': 'by hand'}, plan={'bits': [2, 3, 4]})
  convert.convert_folder(tmp_path / 'ours', tmp_path / 'hf', dtype='bfloat16')
  infos = safetensors_io.read_folder(tmp_path / 'hf')
  assert {info.dtype for info in infos.values()} == {np.dtype(ml_dtypes.bfloat16)}
  wo = infos['encoder.block.1.layer.1.mlp.experts.expert_0.wo.weight'].read()
  expected = np.asarray(tree.get(model.params, WO).expert(0, ml_dtypes.bfloat16)).T
  assert wo.tobytes() == np.ascontiguousarray(expected).tobytes()


def test_from_a_moejax_folder_to_another_the_nodes_stay(switch_model, tmp_path):
  model = compressed(switch_model)
  model.save(tmp_path / 'a', provenance={'how': 'by hand'}, plan={'bits': [2, 3, 4]})
  convert.convert_folder(tmp_path / 'a', tmp_path / 'b', format='moejax', dtype='bfloat16')
  source = store.Source(tmp_path / 'b', verify=True)
  assert source.manifest['plan'] == {'bits': [2, 3, 4]}
  assert source.manifest['provenance'] == {'how': 'by hand'}
  node = source.read(WI)
  assert isinstance(node, weights.Packed)
  assert node.scale.dtype == tree.get(model.params, WI).scale.dtype
  np.testing.assert_array_equal(node.words, tree.get(model.params, WI).words)
  assert source.abstract('shared/embedding').dtype == ml_dtypes.bfloat16
