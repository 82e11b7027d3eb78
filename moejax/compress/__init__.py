"""Compression of mixtures of experts: `compress(model, quantize(...), batches)` and its parts.

Names are imported when first used. `quantize`, `merge`, `prune` and `moefy` are modules here; their
functions are `moejax.quantize`, `moejax.merge`, `moejax.prune`, `moejax.moefy`.
"""

import importlib
from typing import Any

_PUBLIC = {
    'Chain': 'base',
    'ExpertRule': 'foreign',
    'Result': 'driver',
    'Search': 'matrix',
    'Transform': 'base',
    'as_dense': 'dense',
    'chain': 'base',
    'compress': 'driver',
    'compress_tree': 'foreign',
    'dry_run': 'predict',
    'hc_smoe': 'merge',
    'msmoe': 'merge',
    'Look': 'profile',
    'prune_units': 'prune_within',
    'prune_weights': 'prune_within',
    'qmoe': 'quantize',
    'ream': 'merge',
    'skip_second': 'skip',
    'uncurl': 'merge',
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
  if name in _PUBLIC:
    return getattr(importlib.import_module(f'moejax.compress.{_PUBLIC[name]}'), name)
  raise AttributeError(f"module 'moejax.compress' has no attribute {name!r}")
