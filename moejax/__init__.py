"""moejax: train mixture-of-experts models in JAX, and make big ones small.

One letter per axis in names and docstrings, everywhere:

  b batch     t target or query   s source or key   d model width   n heads
  g kv heads  h head width        f FFN width       e experts       k choices a token
  c capacity  m flat tokens       v vocabulary      r rank          u codewords

so `x_btd` is [batch, target, model] and `wi_edf` a stack of expert matrices.

The names below are the public API; they are imported when first used, so that importing moejax
does no JAX work and needs no optional package.
"""

import importlib
from typing import Any

__version__ = '0.1.0'

_PUBLIC = {
    # models
    'Model': 'moejax.model',
    'EncDecConfig': 'moejax.config',
    'EncDecMoeConfig': 'moejax.config',
    'DecoderConfig': 'moejax.config',
    'EncoderConfig': 'moejax.config',
    'DecoderMoeConfig': 'moejax.config',
    'Experiment': 'moejax.config',
    'preset': 'moejax.presets',
    'apply_fn': 'moejax.model',
    'init_params': 'moejax.model',
    'abstract_params': 'moejax.model',
    'Routing': 'moejax.routing.types',
    'expert_dot': 'moejax.ops.expert_dot',
    'UserError': 'moejax.errors',
    # sharding and training
    'make_mesh': 'moejax.sharding',
    'param_shardings': 'moejax.sharding',
    # conversion
    'from_hf': 'moejax.convert.folder',
    'to_hf': 'moejax.convert.folder',
    # compression
    'quantize': 'moejax.compress.quantize',
    'qmoe': 'moejax.compress.quantize',
    'merge': 'moejax.compress.merge',
    'prune': 'moejax.compress.prune',
    'decompose': 'moejax.compress.decompose',
    'moefy': 'moejax.compress.moefy',
    'search_shares': 'moejax.compress.shares',
    'relufy': 'moejax.compress.relufy',
    'upcycle': 'moejax.compress.upcycle',
    'profile': 'moejax.compress.profile',
    'ensemble': 'moejax.evaluate.ensemble',
    'adaptive_resolution': 'moejax.evaluate.adaptive',
    'chain': 'moejax.compress.base',
    'gptq': 'moejax.compress.gptq_core',
    'rtn': 'moejax.compress.gptq_core',
    'Ternary': 'moejax.weights',
    'TernaryV1': 'moejax.weights',
    'Packed': 'moejax.weights',
    'PackedTernary': 'moejax.weights',
    'BlockTernary': 'moejax.weights',
    'LowRankSparse': 'moejax.weights',
    'two_bit': 'moejax.weights',
    'sub_bit': 'moejax.weights',
    # accounting
    'summary': 'moejax.account',
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
  if name in _PUBLIC:
    return getattr(importlib.import_module(_PUBLIC[name]), name)
  raise AttributeError(f"module 'moejax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *_PUBLIC])
