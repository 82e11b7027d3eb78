"""How many experts each layer of a split model runs, for the least loss within a budget of FLOPs.

  python -m experiments.compress --config configs/shares.py --model DIR --calibration TEXT --out DIR

DIR is what configs/moefy.py made. --set budget=0.2 is the share of all experts that run; losses are
those of --calibration: text that is neither what the routers were fitted on nor what is reported.
64 allocations are measured, a predictor (arXiv 2309.09507) tells which others to try.
"""

from moejax.compress.shares import Shares


def get_config() -> Shares:
  return Shares()
