"""Which tile and lane a column is kept in, so that tiles hold like columns and outputs come home.

Tiles take columns in an order, by length. A tile's outputs come home in two cheap moves: each lane
picks one of the tiles for each 128 outputs, then the lanes of each 128 outputs are permuted. So the
columns of one lane must come from different 128 outputs: an edge colouring, with 128 colours, of
the bipartite graph from 128 outputs to tiles, in which every vertex has 128 edges. Halving the
graph along Euler cycles seven times colours it (Gabow 1976).
"""

import numpy as np

from kernels_pallas.subbit_matmul import layout


def _partner(vertex: np.ndarray) -> np.ndarray:
  """Another edge at the same vertex for each edge, in pairs; degrees are even."""
  order = np.argsort(vertex, kind='stable')
  partner = np.empty_like(order)
  partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
  return partner


def _halved(left: np.ndarray, right: np.ndarray) -> np.ndarray:
  """Bool [edges]: at every vertex half of its edges."""
  at_left, at_right = _partner(left), _partner(right)
  jump = at_left[at_right]  # Every second edge along a cycle.
  label = np.arange(left.size)
  for _ in range(left.size.bit_length()):
    label = np.minimum(label, label[jump])
    jump = jump[jump]
  return label < label[at_left]


def deal(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Tile and lane of each column, from their order, a multiple of 128 of them.

  Tile 0 takes the last 128 in order, and so on.
  """
  columns = order.size
  home = np.arange(columns) // layout.LANES
  rank = np.empty(columns, np.int64)
  rank[order[::-1]] = np.arange(columns)
  tile = rank // layout.LANES
  lane = np.zeros(columns, np.int64)
  tiles = columns // layout.LANES
  for _ in range(layout.LANES.bit_length() - 1):
    lane = 2 * lane + _halved(lane * tiles + home, lane * tiles + tile)
  return tile, lane
