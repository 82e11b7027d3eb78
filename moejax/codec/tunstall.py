"""Tunstall tables: 16-bit codewords for runs of ternary symbols, by formula from two integers.

A Tunstall code (B. P. Tunstall, 1967) grows the tree whose leaves are the codewords: the most
probable leaf is split into its three extensions while the next split still fits in 2^16. Every
leaf is a codeword and no inner node is, so parsing is unique and no codeword is spent on strings
that only end rows (QMoE's dictionary, arXiv 2310.16795, 4.2, spends half of its own on those).

Symbols are 0 zero, 1 low, 2 high. A design is a pair (zero cost, nonzero cost) in 1/4096 bit, so
tables are integers from integers: equal on every machine, never stored, named by their id.
"""

from collections.abc import Sequence
import dataclasses
import functools
import heapq

import numpy as np

CODEWORD_BITS = 16
INNER_NODES = 2 ** (CODEWORD_BITS - 1) - 1
CODEWORDS = 2 * INNER_NODES + 1

# (cost of a zero, cost of a low or a high) in 1/4096 bit, by id; the zero share it is made for
# is in the comment. Part of the format: entries may be added at the end, never changed.
DESIGNS: tuple[tuple[int, int], ...] = (
    (6492, 6492),  # 0: 1/3
    (4096, 8192),  # 1: 0.50
    (2825, 9814),  # 2: 0.62
    (1941, 11618),  # 3: 0.72
    (1393, 13318),  # 4: 0.79
    (1030, 14925),  # 5: 0.84
    (823, 16152),  # 6: 0.87
    (656, 17417),  # 7: 0.895
    (493, 19022),  # 8: 0.92
    (334, 21236),  # 9: 0.945
    (211, 23907),  # 10: 0.965
    (119, 27213),  # 11: 0.98
    (47, 32628),  # 12: 0.992
    (12, 40960),  # 13: 0.998
)

DROPPED = 0xFFFF


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """One design's code, for encoding by zero runs and decoding by nonzeros.

  Inner nodes are numbered so that a chain of zeros is a run of consecutive ids; the root is 0.

  Attributes:
    length_u: int32 [u], symbols a codeword stands for.
    nonzeros_uk: uint16 [u, k], (position << 1 | is high), DROPPED past the last.
    chain_n: int32 [inner], zeros from this node to the leaf at the end of its chain.
    chain_code_n: int32 [inner], that leaf's codeword.
    child_ns: int32 [inner, 2], after a low and after a high: an inner node, or -1 - codeword.
  """

  design: int
  length_u: np.ndarray
  nonzeros_uk: np.ndarray
  chain_n: np.ndarray
  chain_code_n: np.ndarray
  child_ns: np.ndarray

  @property
  def max_length(self) -> int:
    return int(self.length_u.max())


def design_rates(zero_share: float) -> np.ndarray:
  """Expected bits a weight of each design on independent symbols, to rank designs by."""
  cost = np.asarray(DESIGNS, np.float64) / 4096
  return zero_share * cost[:, 0] + (1 - zero_share) * cost[:, 1]


def _split_order(zero_cost: int, nonzero_cost: int) -> tuple[np.ndarray, np.ndarray]:
  """Parent and last symbol of each inner node, in the order they are split: cheapest first.

  Equal costs are split in the order they appeared, children in symbol order.
  """
  parent = np.empty(INNER_NODES, np.int64)
  symbol = np.empty(INNER_NODES, np.int64)
  heap = [(0, 0, -1, 0)]
  born = 1
  for node in range(INNER_NODES):
    cost, _, parent[node], symbol[node] = heapq.heappop(heap)
    for s, extra in ((0, zero_cost), (1, nonzero_cost), (2, nonzero_cost)):
      heapq.heappush(heap, (cost + extra, born, node, s))
      born += 1
  return parent, symbol


def _chain_order(parent: np.ndarray, symbol: np.ndarray) -> np.ndarray:
  """New ids that make a node's zero child the next id; chains in the order of their heads."""
  zero_child = np.full(len(parent), -1)
  zero_child[parent[1:][symbol[1:] == 0]] = np.flatnonzero(symbol[1:] == 0) + 1
  new = np.empty(len(parent), np.int64)
  at = 0
  for head in np.concatenate([[0], np.flatnonzero(symbol != 0)]):
    node = head
    while node >= 0:
      new[node] = at
      at += 1
      node = zero_child[node]
  return new


@functools.cache
def table(design: int) -> Table:
  """The table of a design id; built once a process, in about a tenth of a second."""
  parent_old, symbol_old = _split_order(*DESIGNS[design])
  new = _chain_order(parent_old, symbol_old)
  n = INNER_NODES
  parent, symbol = np.full(n, -1), np.zeros(n, np.int64)
  parent[new[1:]], symbol[new] = new[parent_old[1:]], symbol_old
  children = np.full((n, 3), -1)
  children[parent[1:], symbol[1:]] = np.arange(1, n)
  leaf = children < 0
  children[leaf] = -1 - np.arange(CODEWORDS)

  # Depths and nonzeros from the root down: a parent's id is smaller only along chains, so follow
  # the order of splitting, in which parents come first.
  order = new
  length = np.zeros(n, np.int64)
  count = np.zeros(n, np.int64)
  for node in order[1:]:
    length[node] = length[parent[node]] + 1
    count[node] = count[parent[node]] + (symbol[node] > 0)
  most = int(count.max()) + 1
  nonzeros = np.full((n, most), DROPPED, np.uint16)
  for node in order[1:]:
    above = parent[node]
    nonzeros[node] = nonzeros[above]
    if symbol[node] > 0:
      nonzeros[node, count[above]] = (length[above] << 1) | (symbol[node] - 1)

  above, last = np.nonzero(leaf)
  length_u = (length[above] + 1).astype(np.int32)
  nonzeros_uk = nonzeros[above]
  own = last > 0
  nonzeros_uk[own, count[above[own]]] = (length[above[own]] << 1) | (last[own] - 1)

  zero_leaf = np.flatnonzero(leaf[:, 0])
  end = zero_leaf[np.searchsorted(zero_leaf, np.arange(n))]
  return Table(
      design=design,
      length_u=length_u,
      nonzeros_uk=nonzeros_uk,
      chain_n=(end - np.arange(n) + 1).astype(np.int32),
      chain_code_n=(-1 - children[end, 0]).astype(np.int32),
      child_ns=children[:, 1:].astype(np.int32),
  )


@functools.cache
def _codeword_kinds(design: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(zeros, nonzeros) of the codewords, and how many codewords have them."""
  code = table(design)
  count = (code.nonzeros_uk != DROPPED).sum(1)
  kinds, times = np.unique(np.stack([code.length_u - count, count]), axis=1, return_counts=True)
  return kinds[0], kinds[1], times


@functools.lru_cache(maxsize=4096)
def mean_length(design: int, zero_share: float) -> float:
  """Mean weights a codeword of independent symbols of this zero share stands for."""
  zeros, count, times = _codeword_kinds(design)
  nonzero = (1.0 - zero_share) / 2.0
  probability = times * np.power(zero_share, zeros) * np.power(nonzero, count)
  return float(probability @ (zeros + count))


def designs_near(zero_share: float, count: int = 3) -> Sequence[int]:
  """The `count` designs with the least expected rate at this share of zeros, best first."""
  return [int(i) for i in np.argsort(design_rates(zero_share), kind='stable')[:count]]
