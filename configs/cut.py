"""Small activations of a dense model cut to 0, without training; its experts come later.

  python -m experiments.compress --config configs/cut.py --model DIR --calibration TEXT --out DIR

A threshold for each FFN, at which --set sparsity=0.5 of its hidden units are 0 on the calibration.
Variants, after a colon; look at what is left with configs/profile.py and experiments.evaluate:
  teal   of what wo multiplies, gated or not (arXiv 2408.14690)
  cats   of the activation, before a gate (arXiv 2404.08763)
  fat    ReLU instead of the activation, and small values cut too (arXiv 2402.13516); for models
         that were trained with ReLU (configs/relufy.py)
"""

from moejax.compress.relufy import Relufy
from moejax.errors import UserError, did_you_mean

VARIANTS = ('teal', 'cats', 'fat')


def get_config(variant: str = 'teal') -> Relufy:
  if variant not in VARIANTS:
    raise UserError(
        f'configs/cut.py has no variant {variant!r}: one of {", ".join(VARIANTS)}'
        f'{did_you_mean(variant, VARIANTS)}'
    )
  return Relufy(kind=variant)
