"""One battery over transforms and families: structure, files, determinism, counted bytes."""


from pathlib import Path
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax import account, tree
from moejax.compress import compress, dry_run
from moejax.errors import UserError
from moejax.generate import generate
from moejax.model import Model
from moejax.weights import lowrank_core

sys.path.insert(0, str(Path(__file__).parent))
import small_models as small

pytestmark = pytest.mark.once
ROOT = Path(__file__).parents[2]
FAMILIES = ('switch', 'grin', 'mixtral', 'olmoe')
MERGE = moejax.merge(3, budget='uniform')
DECOMPOSE = moejax.decompose(4, keep=0.3)
# One width for all, so that a program serves every family.
WHOLE = moejax.decompose(4, keep=1.0)
CHAINS = {
    'merge, decompose, ternary': moejax.chain(
        MERGE, WHOLE, moejax.quantize('ternary', refit=False)
    ),
    'prune, 2-bit': moejax.chain(moejax.prune('reap', experts=4), moejax.quantize(2)),
    'prune, decompose, 4-bit': moejax.chain(
        moejax.prune('frequency', experts=4), DECOMPOSE, moejax.quantize(4)
    ),
}
FRESH = '''
import sys
import numpy as np
from moejax.model import Model

model, tokens = Model.load(sys.argv[1]), np.load(sys.argv[2])
np.save(sys.argv[3], np.asarray(model.apply(*tokens.values()).logits_btv))
'''


@pytest.mark.long
@pytest.mark.parametrize('family, name', [
    *((family, name) for family in FAMILIES for name in list(CHAINS)[:2]),
    ('mixtral', 'prune, decompose, 4-bit'),
])
def test_chains(family, name, tmp_path):
  model, batches = small.model(family), small.batches(family)
  model.save(tmp_path / 'model')
  result = compress(
      tmp_path / 'model', CHAINS[name], batches, tmp_path / 'out', validation_batches=batches[:1]
  )
  made, report = Model.load(tmp_path / 'out'), result.report
  # What was made is what the config says, and what was reported is what is there.
  wanted = {p: a.shape for p, a in tree.flatten(moejax.abstract_params(made.config)).items()}
  assert {p: tuple(a.shape) for p, a in tree.flatten(made.params).items()} == wanted
  counted = account.summary(made.params, made.config)
  assert {**counted, 'loss': report['loss']} == report['after']
  assert counted['expert_bytes'] < account.summary(model.params, model.config)['expert_bytes']
  assert [step['transform'] for step in report['steps']] == [
      step.name for step in CHAINS[name].steps
  ]
  assert report['loss'] == pytest.approx(small.loss(made, family, batches[0]), abs=1e-4)
  prompt = batches[0]['encoder_tokens' if family == 'switch' else 'tokens'][0].tolist()
  answer = generate(made, [prompt], max_new_tokens=3)
  assert len(answer.tokens[0]) <= 3
  if (family, name) != ('mixtral', 'merge, decompose, ternary'):
    return
  # A new process reads it, and in memory the arrays are the same.
  np.savez(tmp_path / 'tokens.npz', tokens=batches[0]['tokens'])
  subprocess.run(
      [sys.executable, '-c', FRESH, tmp_path / 'out', tmp_path / 'tokens.npz',
       tmp_path / 'logits.npy'], cwd=ROOT, check=True,
  )
  here = made.apply(batches[0]['tokens']).logits_btv
  np.testing.assert_allclose(np.load(tmp_path / 'logits.npy'), here, atol=1e-5)
  again = compress(model, CHAINS[name], batches, validation_batches=batches[:1]).model
  for a, b in zip(jax.tree.leaves(made.params), jax.tree.leaves(again.params), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.long(but=('mixtral',))
@pytest.mark.parametrize('family', ('switch', 'mixtral'))
def test_everything_kept_is_the_weight(family):
  model = small.model(family)
  made = compress(model, moejax.decompose(3, keep=1.0), small.batches(family)).model
  np.testing.assert_allclose(
      small.logits(made, family), small.logits(model, family), rtol=0, atol=2e-4
  )


@pytest.mark.long(but=('magnitude',))
@pytest.mark.parametrize('sensitivity', ('gradients', 'magnitude'))
def test_the_share_is_kept_under_one_threshold(sensitivity):
  model = small.model('mixtral')
  step = moejax.decompose(3, keep=0.25, sensitivity=sensitivity)
  result = compress(model, step, small.batches('mixtral'))
  rows = result.report['layers']
  inputs = [24 if row['path'].endswith('/wo') else 16 for row in rows]
  kept = sum(row['kept'] * n for row, n in zip(rows, inputs))
  total = sum(row['outputs'] * n for row, n in zip(rows, inputs))
  assert 0 <= kept - 0.25 * total <= 24
  assert len({row['kept'] for row in rows}) > 1  # Not the same number in each.
  node = tree.flatten(result.model.params)['decoder/layers_0/ffn/experts/wi']
  before = np.asarray(tree.flatten(model.params)['decoder/layers_0/ffn/experts/wi'])
  left, right, _ = lowrank_core.split(before, 3)
  for e in range(small.EXPERTS):
    own = np.asarray(node.index[e])[np.asarray(node.index[e]) < 24]
    dense = np.asarray(node.expert(e, jnp.float32))
    np.testing.assert_allclose(dense[:, own], before[e][:, own], atol=1e-5)
    rest = np.setdiff1d(np.arange(24), own)
    np.testing.assert_allclose(dense[:, rest], np.asarray(left[e] @ right[e])[:, rest], atol=1e-5)


@pytest.mark.long
def test_ranks():
  model, batches = small.model('mixtral'), small.batches('mixtral')
  made = lambda **how: tree.flatten(compress(
      model, moejax.decompose(keep=0.0, **how), batches
  ).model.params)['decoder/layers_0/ffn/experts/wi']
  assert made(rank=5).left.shape == (6, 16, 5)
  assert made(ratio=0.5).left.shape[2] == lowrank_core.rank_of_ratio((16, 24), 0.5)
  wi = np.asarray(tree.flatten(model.params)['decoder/layers_0/ffn/experts/wi'])
  want = max(lowrank_core.rank_of_energy(w, 0.9) for w in wi)
  assert made(energy=0.9).left.shape[2] == want


def test_the_dry_run_of_a_chain():
  """Shapes alone say what merging and decomposing will weigh."""
  model = small.model('mixtral')
  exact = moejax.chain(MERGE, moejax.decompose(4, keep=1.0))
  told = dry_run(model, exact)['after']
  made = compress(model, exact, small.batches('mixtral')).report['after']
  assert told == {**made, 'loss': None}


@pytest.mark.parametrize('first, then, message', (
    (DECOMPOSE, MERGE, 'merge takes uncompressed weights'),
    (DECOMPOSE, DECOMPOSE, 'decompose takes uncompressed weights'),
    (moejax.quantize(4), DECOMPOSE, 'decompose first, then quantize'),
    (moejax.quantize(4), moejax.prune('reap', experts=4), 'prune first, then compress'),
    (DECOMPOSE, moejax.quantize(4, max_error=0.1), 'neither max_error nor'),
    (MERGE, moejax.merge(2, budget='uniform'), 'merged already'),
))
def test_pairs_that_do_not_go_together(first, then, message):
  with pytest.raises(UserError, match=message):
    compress(small.model('mixtral'), moejax.chain(first, then), small.batches('mixtral'))


def test_the_numbers_of_mc_smoe():
  """The paper's parameters and operations (sections 4 and A) from shapes alone."""
  config = moejax.preset('switch-base-32')
  layers = '(?!encoder/layers_1/).*'
  whole = account.parameters(moejax.abstract_params(config))
  assert round(whole / 1e6, 1) == 1978.5
  merged = dry_run(config, moejax.merge(8, budget='uniform', layers=layers))['after']
  assert round(merged['parameters'] / 1e6, 1) == 732.8
  both = dry_run(config, moejax.chain(
      moejax.merge(8, budget='uniform', layers=layers), moejax.decompose(32, layers=layers)
  ))['after']
  alone = dry_run(config, moejax.decompose(32, layers=layers))['after']
  # The paper counts a tenth of the rest; outputs are kept whole, 307 of 3072 and 77 of 768.
  assert both['parameters'] / 1e6 == pytest.approx(380.7, abs=0.1)
  assert alone['parameters'] / 1e6 == pytest.approx(570.2, abs=0.2)
  flops = 64 * account.forward_flops(config, 329, 13)
  assert flops / 1e12 == pytest.approx(4.65, abs=0.005)
