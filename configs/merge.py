"""Experts merged into fewer (M-SMoE, arXiv 2310.01334, and what came after it).

  python -m experiments.compress --config configs/merge.py --model DIR --calibration TEXT --out DIR

Variants, after a colon (configs/merge.py:hc_smoe):
  msmoe       the most used experts, over all layers together, each take those of like router
              logits; aligned, averaged by usage, behind the old router
  published   the same with MC-SMoE's quirks; to count as it does, see `compress.stats.measure`
  uncurl      spectral clusters and a new router, which is to be trained
  hc_smoe     clusters of mean outputs
  ream        REAP's best absorb their nearest; the router keeps their rows
  mergemoe    msmoe with wo solved for by least squares
  random      the control

Half of the experts go: --set experts=8 leaves 8 a layer instead, --set ratio=0.25 takes a quarter,
--set layer_experts='[4,8,8]' says each layer's. Any other field too: --set layers='decoder/.*'.
A decoder of 16 experts takes about as long as ten passes over its calibration, most of it matching
hidden units; memory holds one group of experts and a piece of the calibration.
"""

from moejax.compress import hc_smoe, msmoe, ream, uncurl
from moejax.compress.merge import Merge, merge
from moejax.errors import UserError, did_you_mean

VARIANTS = {
    'msmoe': lambda: merge(ratio=0.5),
    'published': lambda: msmoe(ratio=0.5),
    'uncurl': lambda: uncurl(ratio=0.5),
    'hc_smoe': lambda: hc_smoe(ratio=0.5),
    'ream': lambda: ream(ratio=0.5),
    'mergemoe': lambda: merge(ratio=0.5, operator='least_squares'),
    'random': lambda: merge(ratio=0.5, budget='uniform', grouping='random'),
}


def get_config(variant: str = 'msmoe') -> Merge:
  if variant not in VARIANTS:
    raise UserError(
        f'configs/merge.py has no variant {variant!r}: one of {", ".join(VARIANTS)}'
        f'{did_you_mean(variant, VARIANTS)}'
    )
  return VARIANTS[variant]()
