"""A dense model upcycled: the same function at first, then a mixture of experts that can train."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax import Model, from_hf, to_hf, tree, upcycle
from moejax.errors import UserError

pytestmark = pytest.mark.once

_SPEC = importlib.util.spec_from_file_location(
    'small_models', Path(__file__).with_name('small_models.py')
)
small = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(small)


@pytest.mark.long(but=('llama-2-2',))
@pytest.mark.parametrize('family, top_k, every', [
    ('t5', 1, 2), ('t5_gated', 2, 1), ('llama', 2, 2)
])
def test_the_function_is_the_same_until_it_trains(family, top_k, every, tmp_path):
  model = small.model(family)
  made = upcycle(model, 4, top_k=top_k, every=every)
  want = small.logits(model, family)
  np.testing.assert_allclose(small.logits(made, family), want, atol=3e-6 * np.abs(want).max())
  layers = sum(len(made.config.sparse_layers(stack)) for stack in made.config.stacks)
  ffn = 3 if model.config.gated else 2
  grown = layers * (3 * ffn * 16 * 24 + 16 * 4)
  assert tree.count(made.params) == tree.count(model.params) + grown
  made.save(tmp_path / 'model')
  again = Model.load(tmp_path / 'model')
  np.testing.assert_array_equal(small.logits(again, family), small.logits(made, family))
  batch = small.batches(family, 1)[0]
  names = ('encoder_tokens', 'decoder_tokens') if family.startswith('t5') else ('tokens',)

  def spread(params):
    return Model(made.config, params).apply(*(batch[n] for n in names)).logits_btv.std()

  grads = tree.flatten(jax.jit(jax.grad(spread))(made.params))
  assert all(np.isfinite(np.asarray(g)).all() for g in grads.values())
  assert any(np.abs(np.asarray(g)).max() > 0 for p, g in grads.items() if 'experts' in p)


def test_an_upcycled_llama_is_a_mixtral(tmp_path):
  made = upcycle(small.model('llama'), 4, every=1)
  to_hf(made, tmp_path / 'hf')
  again = from_hf(tmp_path / 'hf')
  assert again.config.family == 'mixtral'
  np.testing.assert_allclose(small.logits(again, 'llama'), small.logits(made, 'llama'), atol=1e-5)


def test_noise_parts_the_copies():
  made = upcycle(small.model('t5'), 3, noise=0.1, key=jax.random.key(1))
  wi = np.asarray(made.params['encoder']['layers_1']['ffn']['experts']['wi'])
  old = np.asarray(small.model('t5').params['encoder']['layers_1']['ffn']['wi'])
  away = (wi - old[None]).std((1, 2)) / old.std()
  assert away.min() > 0.08 and away.max() < 0.12 and not np.array_equal(wi[0], wi[1])


def test_what_cannot_be_upcycled_is_one_line():
  with pytest.raises(UserError, match='have biases'):
    upcycle(small.model('opt'), 4)
  made = upcycle(small.model('t5'), 4)
  with pytest.raises(UserError, match='experts already'):
    upcycle(made, 4)
  with pytest.raises(UserError, match='every = 0'):
    upcycle(small.model('t5'), 4, every=0)
  with pytest.raises(UserError, match='top_k'):
    upcycle(small.model('t5'), 2, top_k=3)
