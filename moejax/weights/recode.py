"""The same ternary weights in another code: for size, or for speed where there is room."""

from typing import Any

import jax

from moejax.weights.block_ternary import BlockTernary
from moejax.weights.packed_ternary import PackedTernary
from moejax.weights.ternary import Ternary
from moejax.weights.ternary_v1 import TernaryV1


def two_bit(params: Any) -> Any:
  """The tree with every ternary node at two bits a weight (host arrays): larger, and quicker.

  The weights are the same ones. Nodes of other classes and arrays stay as they are.
  """
  def recode(leaf):
    if isinstance(leaf, Ternary | TernaryV1):
      return PackedTernary.from_node(leaf)
    return leaf.two_bit() if isinstance(leaf, BlockTernary) else leaf

  return jax.tree.map(recode, params, is_leaf=_is_ternary)


def sub_bit(params: Any) -> Any:
  """The tree with every ternary node in codes below one bit that kernels decode (host arrays).

  The weights are the same ones. Nodes of other classes and arrays stay as they are.
  """
  def recode(leaf):
    ternary = Ternary | TernaryV1 | PackedTernary
    return BlockTernary.from_node(leaf) if isinstance(leaf, ternary) else leaf

  return jax.tree.map(recode, params, is_leaf=_is_ternary)


def _is_ternary(leaf: Any) -> bool:
  return isinstance(leaf, Ternary | TernaryV1 | PackedTernary | BlockTernary)
