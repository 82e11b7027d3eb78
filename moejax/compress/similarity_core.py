"""How alike the experts of a layer are (M-SMoE, arXiv 2310.01334, section 3.1 and table 4).

Every basis but `mse` and `feature_correlation` is a cosine, moved to [0, 1]; all give a symmetric
matrix [e, e] with ones on its diagonal, in float32. Weights are as in a layer: wi and gate
[e, d, f], wo [e, f, d].
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.compress import align_core
from moejax.config import Act

EPS = 1e-7


def from_gram(gram_ee: jax.typing.ArrayLike) -> jax.Array:
  """(cos + 1) / 2 from the inner products of the experts' vectors, norms at least 1e-7.

  With the Gram matrix of the router's logits, H^T H over all tokens, this is `router-logits`, the
  basis that the paper recommends; it is summed up over batches, so no logit is kept.
  """
  gram = jnp.asarray(gram_ee, jnp.float32)
  norm = jnp.maximum(jnp.sqrt(jnp.diagonal(gram)), EPS)
  return _ones_on_diagonal((gram / (norm[:, None] * norm[None, :]) + 1) / 2)


def from_vectors(vectors_en: jax.typing.ArrayLike) -> jax.Array:
  """The same from a vector an expert, [e, n]."""
  return from_gram(gram(vectors_en))


def gram(vectors: jax.typing.ArrayLike) -> jax.Array:
  """Inner products of arrays [e, ...], each taken as one vector, [e, e]."""
  return products(vectors, vectors)


def products(a: jax.typing.ArrayLike, b: jax.typing.ArrayLike) -> jax.Array:
  """Inner products of arrays [e, ...] and [c, ...], each taken as one vector, [e, c]."""
  a, b = (jnp.asarray(v, jnp.float32) for v in (a, b))
  flat = lambda v: v.reshape(v.shape[0], -1)
  return jnp.einsum('en,cn->ec', flat(a), flat(b), precision='highest')


def router_weight(router_de: jax.typing.ArrayLike) -> jax.Array:
  """By the experts' rows of the router."""
  return from_vectors(jnp.asarray(router_de).T)


def router_weight_feature(
    router_de: jax.typing.ArrayLike, square_sum_d: jax.typing.ArrayLike
) -> jax.Array:
  """Router rows times the norm of each input feature over all tokens (its sum of squares)."""
  scale_d = jnp.sqrt(jnp.asarray(square_sum_d, jnp.float32))
  return from_vectors(jnp.asarray(router_de, jnp.float32).T * scale_d[None])


def weight(experts: Mapping[str, Any]) -> jax.Array:
  """By all weights of an expert, or by their gradients: basis `weight`, or `gradient`."""
  return from_gram(sum(gram(w) for w in experts.values()))


def weight_gradient(experts: Mapping[str, Any], gradients: Mapping[str, Any]) -> jax.Array:
  """By weights times their gradients, element by element."""
  return from_gram(sum(gram(jnp.asarray(w) * gradients[name]) for name, w in experts.items()))


def weight_feature(
    experts: Mapping[str, Any], square_sum_ed: jax.typing.ArrayLike
) -> jax.Array:
  """First matrices times the norm of each input feature over the expert's own tokens."""
  scale_ed1 = jnp.sqrt(jnp.asarray(square_sum_ed, jnp.float32))[..., None]
  return from_gram(sum(gram(w * scale_ed1) for name, w in experts.items() if name != 'wo'))


def mse(
    experts: Mapping[str, Any], inputs: Sequence[np.ndarray], activation: Act
) -> np.ndarray:
  """1 / (1 + 0.1 ln SSE) of two experts' plain average against each on its own tokens.

  As published; it has a pole at SSE = exp(-10). inputs: [m_e, d] of every expert.
  """
  outputs = [_output(_expert(experts, e), x, activation) for e, x in enumerate(inputs)]

  def score(i: int, j: int) -> float:
    if not len(inputs[i]) + len(inputs[j]):
      return 1.0
    mean = {name: (w[i] + w[j]) / 2 for name, w in experts.items()}
    error = sum(
        float(np.sum((_output(mean, inputs[k], activation) - outputs[k]) ** 2)) for k in (i, j)
    )
    return 1 / (1 + 0.1 * np.log(error))

  return _pairs(len(inputs), score)


def feature_correlation(
    experts: Mapping[str, Any], inputs: Sequence[np.ndarray], activation: Act,
    match: str = 'lsa',
) -> np.ndarray:
  """Mean correlation, moved to [0, 1], of matched hidden units on the tokens of both experts.

  Args:
    inputs: [m_e, d] of every expert.
    match: 'lsa', one to one; 'max', each unit of the later expert with its best.
  """

  def score(i: int, j: int) -> float:
    x = np.concatenate([inputs[i], inputs[j]])
    if len(x) <= 1:
      return 1.0
    hidden = [align_core.hidden_units(_expert(experts, e), x, activation) for e in (i, j)]
    c = align_core.correlation(*hidden)
    best = c[np.arange(len(c)), align_core.match(c)] if match == 'lsa' else c.max(0)
    return float((best.mean() + 1) / 2)

  return _pairs(len(inputs), score)


def _expert(experts: Mapping[str, Any], e: int) -> dict[str, Any]:
  return {name: w[e] for name, w in experts.items()}


def _output(expert: Mapping[str, Any], x_md: np.ndarray, activation: Act) -> np.ndarray:
  y = align_core.hidden_units(expert, x_md, activation) @ np.asarray(expert['wo'], np.float32)
  return y + expert['wo_bias'] if 'wo_bias' in expert else y


def _pairs(experts: int, score) -> np.ndarray:
  out = np.eye(experts, dtype=np.float32)
  for i in range(experts):
    for j in range(i + 1, experts):
      out[i, j] = out[j, i] = score(i, j)
  return out


def _ones_on_diagonal(s_ee: jax.Array) -> jax.Array:
  return jnp.where(jnp.eye(len(s_ee), dtype=bool), 1.0, s_ee)


def gram_in_blocks(vectors: Any, experts: int, block: int) -> np.ndarray:
  """Inner products of experts' weights, [e, e], float64; `vectors(ids)` gives those of some."""
  out = np.zeros((experts, experts))
  blocks = [range(i, min(i + block, experts)) for i in range(0, experts, block)]
  for i, rows in enumerate(blocks):
    left = vectors(rows)
    for columns in blocks[i:]:
      right = left if columns is rows else vectors(columns)
      both = sum(
          np.asarray(products(left[name], right[name]), np.float64)
          for name in left
      )
      out[rows.start : rows.stop, columns.start : columns.stop] = both
      out[columns.start : columns.stop, rows.start : rows.stop] = np.asarray(both).T
  return out
