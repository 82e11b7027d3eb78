"""Operations that dispatch on the class of a weight, attention and norms."""

from moejax.ops import compressed as compressed  # registers the weight nodes
