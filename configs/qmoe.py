"""QMoE: experts below one bit a weight, by GPTQ with each expert's own inputs (arXiv 2310.16795).

  python -m experiments.compress --config configs/qmoe.py --model DIR --calibration TEXT --out DIR

Variants, after a colon (configs/qmoe.py:two_bit):
  ternary    three levels an output, refitted by least squares; about 0.7 bits a weight
  one_bit    ternary, large inputs first, the grid of each matrix searched; at most 1.0 bit a
             weight in all, or as few as its metadata leaves
  published  as in the paper, in its file format; no refit
  rounded    ternary by plain rounding, for comparison
  two_bit, three_bit, four_bit, eight_bit
  gated      ternary; a matrix that loses over 30 % of its output takes 2, 3, 4 or 16 bits

Any field can be set: --set matrix.damping=0.01 --set layers='decoder/.*'. Runs on a laptop for
small models; memory holds one group of experts and the hidden states of the calibration samples.
"""

from moejax.compress.matrix import Search
from moejax.compress.quantize import Quantize, qmoe, quantize
from moejax.errors import UserError, did_you_mean

VARIANTS = {
    'ternary': lambda: quantize('ternary'),
    'one_bit': lambda: quantize(
        'ternary', act_order=True, refit=False, search=Search(target_bits=1.0)
    ),
    'published': lambda: qmoe('ternary'),
    'rounded': lambda: quantize('ternary', method='rtn', refit=False),
    'two_bit': lambda: quantize(2),
    'three_bit': lambda: quantize(3),
    'four_bit': lambda: quantize(4),
    'eight_bit': lambda: quantize(8),
    'gated': lambda: quantize('ternary', max_error=0.3),
}


def get_config(variant: str = 'ternary') -> Quantize:
  if variant not in VARIANTS:
    raise UserError(
        f'configs/qmoe.py has no variant {variant!r}: one of {", ".join(VARIANTS)}'
        f'{did_you_mean(variant, VARIANTS)}'
    )
  return VARIANTS[variant]()
