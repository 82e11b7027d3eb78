"""Compression of mixtures of experts: `compress(model, quantize(...), batches)` and its parts.

Names are imported when first used. `quantize` is a module here; its function is `moejax.quantize`.
"""

import importlib
from typing import Any

_PUBLIC = {
    'Chain': 'base',
    'ExpertRule': 'foreign',
    'Result': 'driver',
    'Search': 'matrix',
    'Transform': 'base',
    'chain': 'base',
    'compress': 'driver',
    'compress_tree': 'foreign',
    'dry_run': 'predict',
    'qmoe': 'quantize',
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
  if name in _PUBLIC:
    return getattr(importlib.import_module(f'moejax.compress.{_PUBLIC[name]}'), name)
  raise AttributeError(f"module 'moejax.compress' has no attribute {name!r}")
