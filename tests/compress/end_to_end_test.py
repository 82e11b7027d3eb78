"""The public driver on the reference's tiny model: the same symbols, hidden states and losses."""

from pathlib import Path
import sys

import numpy as np
import pytest

from moejax.compress import driver, parts, quantize

sys.path.insert(0, str(Path(__file__).parent))
import reference_model as common

CASES = {
    'qmoe_1p5': {}, 'qmoe_2': {'bits': 2}, 'qmoe_1p5_trueseq': {'true_sequential': True},
    'qmoe_1p5_skipenc': {'layers': 'decoder/.*'}, 'qmoe_1p5_nomask': {'mask_special': False},
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
