"""Neurons to cluster, the same for every side."""

import numpy as np

SIZES, QUICK = (3072, 768, 96), (64, 16, 8)


def neurons(rows: int, d: int, experts: int) -> np.ndarray:
  """Groups of neurons, most of each vector noise, all of length 1, float32 [rows, d]."""
  rng = np.random.default_rng(0)
  centres = rng.standard_normal((experts, d), np.float32)
  noise = 2.5 * rng.standard_normal((rows, d), np.float32)
  made = centres[rng.permutation(rows) % experts] + noise
  return made / np.linalg.norm(made, axis=1, keepdims=True)
