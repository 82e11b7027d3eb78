"""Compressed weight nodes: each takes the place of an array [e, d, f] or [d, f] in the params."""

from moejax.weights.base import WeightNode
from moejax.weights.block_ternary import BlockTernary
from moejax.weights.low_rank_sparse import LowRankSparse
from moejax.weights.mixed import Mixed
from moejax.weights.packed import Packed
from moejax.weights.packed_ternary import PackedTernary
from moejax.weights.recode import sub_bit, two_bit
from moejax.weights.ternary import Ternary
from moejax.weights.ternary_v1 import TernaryV1

NODE_CLASSES: dict[str, type[WeightNode]] = {
    c.__name__: c for c in (
        Ternary, TernaryV1, Packed, PackedTernary, BlockTernary, Mixed, LowRankSparse
    )
}

__all__ = [
    'NODE_CLASSES', 'BlockTernary', 'LowRankSparse', 'Mixed', 'Packed', 'PackedTernary', 'Ternary',
    'TernaryV1', 'WeightNode', 'sub_bit', 'two_bit',
]
