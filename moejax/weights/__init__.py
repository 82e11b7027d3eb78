"""Compressed weight nodes: each takes the place of an array [e, d, f] or [d, f] in the params."""

from moejax.weights.base import WeightNode
from moejax.weights.packed import Packed
from moejax.weights.ternary import Ternary

NODE_CLASSES: dict[str, type[WeightNode]] = {c.__name__: c for c in (Ternary, Packed)}

__all__ = ['NODE_CLASSES', 'Packed', 'Ternary', 'WeightNode']
