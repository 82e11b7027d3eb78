"""Measuring a model: loss on text, routing health, agreement with another model, baselines."""

from moejax.evaluate.bigram import Bigram
from moejax.evaluate.metrics import (
    agreement_sums,
    evaluate,
    examples_of,
    layer_loads,
    loss_sums,
    routing_health,
    without_experts,
)
from moejax.evaluate.samples import (
  data_config,
  example_pieces,
  fixed_batches,
  previous_tokens,
  spread,
)

__all__ = [
    'Bigram',
    'agreement_sums',
    'data_config',
    'evaluate',
    'example_pieces',
    'examples_of',
    'fixed_batches',
    'layer_loads',
    'loss_sums',
    'previous_tokens',
    'routing_health',
    'spread',
    'without_experts',
]
