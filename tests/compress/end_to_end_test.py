"""The public driver on the reference's tiny model: the same symbols, hidden states and losses."""

from pathlib import Path
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.compress import driver, gptq_core, parts, quantize

sys.path.insert(0, str(Path(__file__).parent))
import common

CASES = {
    'qmoe_1p5': {}, 'qmoe_2': {'bits': 2}, 'qmoe_1p5_trueseq': {'true_sequential': True},
    'qmoe_1p5_skipenc': {'layers': 'decoder/.*'},
    'rtn_1p5': {'method': 'rtn'}, 'rtn_2': {'bits': 2, 'method': 'rtn'},
}


@pytest.mark.parametrize('case', CASES)
def test_reference_run(case):
  data = common.arrays()
  # One sample is enough to round: no statistic is used.
  calibration = common.batches(0, 1 if case.startswith('rtn') else 60)
  result = driver.compress(
      common.model(), quantize.qmoe(**CASES[case]), calibration,
      validation_batches=common.batches(60, 76),
  )
  assert abs(result.report['loss'] - float(data[f'loss_{case}'])) < 1e-4
  experts = [('encoder', 'wi'), ('encoder', 'wo'), ('decoder', 'wi'), ('decoder', 'wo')]
  for i, (stack, name) in enumerate(experts):
    if f'Q_{case}_{i}' not in data:
      continue
    ours = parts.dense(result.model.params[stack]['layers_1']['ffn']['experts'][name])
    np.testing.assert_allclose(ours, np.swapaxes(data[f'Q_{case}_{i}'], 1, 2), rtol=0, atol=1e-6)
  if case == 'qmoe_1p5':
    for stack in ('encoder', 'decoder'):
      states = getattr(result, f'{stack}_md')
      np.testing.assert_allclose(states, data[f'final_hidden_{stack}'], rtol=0, atol=1e-4)
    check_tokens(result.report, data)


def gptq_float64(w_df, h_dd):
  """Ternary GPTQ of one matrix with block size 1, in float64; also each weight's distance to its
  nearest threshold, as a share of it."""
  w, h = w_df.astype(np.float64), h_dd.astype(np.float64)
  h = h + max(0.1 * np.diag(h).mean(), 1e-6) * np.eye(len(h))
  u = np.linalg.cholesky(np.linalg.inv(h)).T
  low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
  symbols, distance = np.zeros(w.shape, np.int8), np.zeros(w.shape)
  for j in range(len(w)):
    symbols[j] = np.where(w[j] > high / 2, 2, np.where(w[j] < low / 2, 1, 0))
    distance[j] = np.minimum(abs(w[j] / (high / 2) - 1), abs(w[j] / (low / 2) - 1))
    q = np.where(symbols[j] == 2, high, np.where(symbols[j] == 1, low, 0))
    w[j:] -= np.outer(u[j, j:], (w[j] - q) / u[j, j])
  return symbols, distance


def test_reference_run_without_mask(monkeypatch):
  """This run meets a tie (4e-7 from its threshold) on which hundreds of later symbols hang.

  So the loss is checked with GPTQ in float64, and the library's symbols may differ from those only
  from such a tie on.
  """
  ours, calls = gptq_core.gptq, []

  def exact(w_edf, h_edd, bits, **options):
    out = ours(w_edf, h_edd, bits, **options)
    pairs = [gptq_float64(np.asarray(w), np.asarray(h)) for w, h in zip(w_edf, h_edd)]
    symbols = np.stack([symbols for symbols, _ in pairs])
    calls.append((np.asarray(out.symbols), symbols, np.stack([d for _, d in pairs])))
    symbols = jnp.asarray(symbols)
    return out._replace(symbols=symbols, values=out.grid.values(symbols))

  monkeypatch.setattr(gptq_core, 'gptq', exact)
  result = driver.compress(
      common.model(), quantize.qmoe(mask_special=False), common.batches(0, 60),
      validation_batches=common.batches(60, 76),
  )
  golden = float(common.arrays()['loss_qmoe_1p5_nomask'])
  assert abs(result.report['loss'] - golden) < 1e-4
  assert len(calls) == 4
  for mine, exact_symbols, distance in calls:
    differs = mine != exact_symbols
    assert differs.mean() < 1e-3
    first = differs & (np.cumsum(differs, axis=1) == 1)
    assert (distance[first] < 1e-6).all()


def check_tokens(report, data):
  """Each expert's calibration tokens: its routed ones, capped, without validation and special."""
  for s, stack in enumerate(('encoder', 'decoder')):
    expert_of, keep = data[f'expert_index_{stack}'], data[f'keep_mask_{stack}']
    limit = data[f'{stack[:3]}_len'][:60].sum()
    for row in report['layers']:
      if not row['path'].startswith(stack):
        continue
      tokens = np.flatnonzero(expert_of == row['expert'])[: data['token_cap'][s]]
      tokens = tokens[(tokens < limit) & keep[tokens]]
      assert row['tokens'] == len(tokens), row


def test_uncompressed_loss():
  """The walk itself, with nothing compressed that matters: 4 bits lose little."""
  result = driver.compress(
      common.model(), quantize.qmoe(4, layers='encoder/.*'), common.batches(0, 60),
      validation_batches=common.batches(60, 76),
  )
  assert abs(result.report['loss'] - float(common.arrays()['loss_fp32'])) < 0.02
