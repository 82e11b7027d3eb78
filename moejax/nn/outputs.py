"""What applying a model returns."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax

from moejax.ops.activity import Activity
from moejax.routing.types import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
  """logits_btv float32, each sparse layer's Routing by path, and what else an architecture has.

  encoder_bsd: an encoder's final hidden states; of one without a head the logits are empty.
  caches: a decoder's keys and values by layer.
  states: what every layer of a stack gives, [layers, b, t, d] by stack, the last one normed; only
    where asked for.
  activity: how active each dense FFN's hidden units are, by path; only where asked for.
  """

  logits_btv: jax.Array
  routings: dict[str, Routing]
  encoder_bsd: jax.Array | None = None
  caches: Any = None
  states: dict[str, jax.Array] | None = None
  activity: dict[str, Activity] | None = None


def of_ffns(told: Mapping[str, Any], observe: bool) -> dict[str, Any]:
  """What the FFNs of a model told, as fields of its Output."""
  routings = {path: own for path, own in told.items() if isinstance(own, Routing)}
  rest = {path: own for path, own in told.items() if path not in routings}
  return {'routings': routings, 'activity': rest if observe else None}
