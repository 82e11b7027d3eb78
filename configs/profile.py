"""What a dense model's neurons do, before it is split: how sparse, and what a share of them loses.

  python -m experiments.compress --config configs/profile.py --model DIR --calibration TEXT \
      --validation TEXT --out DIR

Writes profile.json and profile.png to --out and prints a table; the model is not changed. One pass
over the calibration, and one over calibration and validation for each of 10, 20 and 30 % of the
neurons, chosen by an oracle: no router does better by the same measure. --set expert_size=64,
--set shares=[0.1,0.5], --set threshold=0.05 for activations that are never 0.
"""

from moejax.compress.profile import Look


def get_config() -> Look:
  return Look()
