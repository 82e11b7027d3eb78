"""Experts dropped, and their rows of the router with them (REAP, arXiv 2510.13999, and others).

  python -m experiments.compress --config configs/prune.py --model DIR --calibration TEXT --out DIR

Variants, after a colon (configs/prune.py:naee): every method of `moejax.prune`, reap by default:
reap, ean, man, msan, frequency, soft_frequency, aimer, naee, task_specific, random. Within experts:
units drops hidden units (--set units=512), weights all but 2 of every 4 weights (--set n=1).

Half of the experts go: --set experts=8 leaves 8 a layer instead, --set ratio=0.25 takes a quarter,
--set budget=global one threshold over all layers. As long as two passes over the calibration;
memory holds a group of experts and a piece of the calibration.
"""

from moejax.compress import base
from moejax.compress.prune import METHODS, prune
from moejax.compress.prune_within import prune_units, prune_weights
from moejax.errors import UserError, did_you_mean

VARIANTS = (*METHODS, 'units', 'weights')


def get_config(variant: str = 'reap') -> base.Transform:
  if variant not in VARIANTS:
    raise UserError(
        f'configs/prune.py has no variant {variant!r}: one of {", ".join(VARIANTS)}'
        f'{did_you_mean(variant, VARIANTS)}'
    )
  if variant == 'units':
    return prune_units(ratio=0.5)
  if variant == 'weights':
    return prune_weights()
  return prune(variant, ratio=0.5)
