"""Quantiles from counts against those of NumPy, in pieces and at the ends."""

import numpy as np
import pytest

from moejax.compress import sizes_core
from moejax.errors import UserError


@pytest.mark.parametrize('scale', [1e-20, 1.0, 1e20])
@pytest.mark.parametrize('share', [0.1, 0.5, 0.999])
def test_quantiles_are_near_those_of_all_values(scale, share):
  values = (np.random.default_rng(0).normal(size=(64, 500)) * scale).astype(np.float32)
  counts = sizes_core.empty()
  for piece in np.array_split(values, 7):
    counts = sizes_core.add(counts, piece)
  cut = sizes_core.cut(counts, share)
  assert cut == pytest.approx(np.quantile(np.abs(values), share), rel=0.005)
  at_most = float((np.abs(values) <= cut).mean())
  assert share <= at_most < share + 0.005
  assert sizes_core.share(counts, cut) == pytest.approx(at_most)


def test_zeros_need_no_cut():
  counts = sizes_core.add(sizes_core.empty(), [0.0, 0.0, 0.0, 1.0, -2.0])
  assert sizes_core.cut(counts, 0.6) == 0
  assert 1.0 <= sizes_core.cut(counts, 0.8) < 1.01
  assert sizes_core.cut(counts, 0.0) == 0


def test_bad_values():
  with pytest.raises(UserError, match='at least one token'):
    sizes_core.cut(sizes_core.add(sizes_core.empty(), np.zeros((0, 4))), 0.5)
  with pytest.raises(UserError, match='2 of 3 activations are not finite'):
    sizes_core.add(sizes_core.empty(), [np.nan, np.inf, 1.0])
  with pytest.raises(UserError, match='sparsity = 1'):
    sizes_core.cut(sizes_core.add(sizes_core.empty(), [1.0]), 1.0)
