"""What applying a model returns."""

import dataclasses
from typing import Any

import jax

from moejax.routing.types import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
  """logits_btv float32, each sparse layer's Routing by path, and what else an architecture has.

  encoder_bsd: the encoder's final hidden states. caches: a decoder's keys and values by layer.
  states: what every layer of a stack gives, [layers, b, t, d] by stack, the last one normed; only
    where asked for.
  """

  logits_btv: jax.Array
  routings: dict[str, Routing]
  encoder_bsd: jax.Array | None = None
  caches: Any = None
  states: dict[str, jax.Array] | None = None
