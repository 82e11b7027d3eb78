"""A dense model's FFNs as experts and routers: a token runs a share of its neurons (MoEfication).

  python -m experiments.compress --config configs/moefy.py --model DIR --calibration TEXT --out DIR

Experts have 32 neurons and a token runs a fifth of them. Variants, after a colon:
  moefication  balanced clusters and an MLP (arXiv 2110.01786)
  published    the same with the targets of the public code
  similarity   no training: the cosine of the token and an expert's centre
  dynamic      a number of experts that depends on the token (D2DMoE, arXiv 2310.04361)
  cmoe         shared neurons and an analytic router, for gated layers (arXiv 2502.04416)
  emoe         the mean of an expert's gates, for gated layers (arXiv 2310.10908)
  filled       experts that do not run give their mean, for smooth activations (G-MoEfication)

--set share=0.3, --set expert_size=128, --set mass=0.95 for as many experts in each layer as hold
that share of its activation, --set calibrate=true to fit the output matrices to the dense outputs.
Look first (configs/profile.py). A T5 of four layers 256x1024 took 30 seconds on two cores. Memory
holds one layer, 10,000 of its calibration tokens and their hidden units.
"""

from typing import Any

from moejax.compress import base
from moejax.compress.moefy import moefy
from moejax.errors import UserError, did_you_mean

VARIANTS: dict[str, dict[str, Any]] = {
    'moefication': {},
    'published': {'published': True},
    'similarity': {'choice': 'cosine'},
    'dynamic': {'choice': 'norm', 'rule': 'within'},
    'cmoe': {'split': 'shared', 'shared': 0.1, 'choice': 'representatives'},
    'emoe': {'choice': 'average'},
    'filled': {'fill': True},
}


def get_config(variant: str = 'moefication') -> base.Transform:
  if variant not in VARIANTS:
    raise UserError(
        f'configs/moefy.py has no variant {variant!r}: one of {", ".join(VARIANTS)}'
        f'{did_you_mean(variant, VARIANTS)}'
    )
  return moefy(expert_size=32, **VARIANTS[variant])
