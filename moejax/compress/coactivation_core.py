"""Neurons that fire together become one expert: MoEfication's graph split (arXiv 2110.01786).

The weight between two neurons grows with the tokens for which both are active. The graph of these
weights is cut into experts of equal size that keep as much weight inside as they can: by METIS
(the optional package pymetis) or by a spectral cut of our own, and after both by exchanging pairs
of neurons for as long as that helps. Hidden values are [m, f]; what is below zero counts as zero.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moejax.compress import shared_split_core
from moejax.errors import UserError

WEIGHTS = ('product', 'count', 'reference')
METHODS = ('auto', 'metis', 'own')
GROUP = 8  # Tokens of a group, published.
CHUNK = 512  # Tokens summed at a time, whatever the blocks they come in.
TILE = 64
SWEEPS = 200  # Sweeps of trades, at most.
SMALL = 1024  # Neurons up to which several starts are tried.
RESTARTS = 4


@dataclasses.dataclass(frozen=True)
class Total:
  """What the tokens so far add up to.

  weights: which weights these are. sum_ff: float32 [f, f], over whole chunks of tokens.
  rest_mf: float32, the tokens that wait for a whole chunk.
  """

  weights: str
  sum_ff: np.ndarray
  rest_mf: np.ndarray


def add_hidden(
    total: Total | None, hidden_mf: np.ndarray, weights: str = 'product'
) -> Total:
  """Adds a block of tokens to the total; None starts one. `adjacency` gives the matrix.

  The memory does not grow with tokens, and how they are cut into blocks changes nothing.

  Args:
    hidden_mf: hidden values after the activation; negative ones count as zero.
    weights: 'product' (paper), the sum of products of two neurons' values; 'count', the tokens
      for which both are positive; 'reference' (published code), the products summed over each 8
      consecutive tokens and cut to 1, then summed; fewer than 8 tokens at the end are dropped.

  Raises:
    UserError: other weights, than the total's too; another number of neurons; a value that is not
      finite.
  """
  if weights not in WEIGHTS or (total is not None and weights != total.weights):
    known = WEIGHTS if total is None else (total.weights,)
    raise UserError(f'weights {weights!r}: {" or ".join(map(repr, known))}')
  hidden = np.asarray(hidden_mf, np.float32)
  neurons = hidden.shape[-1:] if total is None else total.sum_ff.shape[:1]
  if hidden.ndim != 2 or hidden.shape[1:] != neurons or not neurons[0]:
    raise UserError(f'hidden values of shape {hidden.shape}: give [tokens, neurons] of one layer')
  if not np.isfinite(hidden).all():
    raise UserError('hidden values hold NaN or infinity: check the inputs and weights of the layer')
  if total is None:
    total = Total(weights, np.zeros(neurons * 2, np.float32), hidden[:0])
  waiting, summed = np.concatenate([total.rest_mf, hidden]), total.sum_ff
  whole = len(waiting) // CHUNK * CHUNK
  for first in range(0, whole, CHUNK):
    summed = _add(summed, waiting[first : first + CHUNK], weights)
  return Total(weights, np.asarray(summed), waiting[whole:].copy())


def adjacency(total: Total) -> np.ndarray:
  """The co-activation of every two neurons, float32 [f, f], symmetric, its diagonal included."""
  rest = total.rest_mf
  if total.weights == 'reference':
    rest = rest[: len(rest) // GROUP * GROUP]
  if not len(rest):
    return total.sum_ff.copy()
  padded = np.pad(rest, ((0, CHUNK - len(rest)), (0, 0)))
  return np.asarray(_add(total.sum_ff, padded, total.weights))


@functools.partial(jax.jit, static_argnames='weights')
def _add(sum_ff, hidden_mf, weights):
  h = jnp.maximum(hidden_mf, 0)
  if weights == 'count':
    h = (h > 0).astype(jnp.float32)
  if weights != 'reference':
    return sum_ff + jnp.matmul(h.T, h, precision='highest')
  neurons = h.shape[1]
  groups_gkf = h.reshape(-1, GROUP, neurons)

  def tile(first):
    """Rows of the sum, few enough to stay in the cache over all groups."""
    rows_gkn = jax.lax.dynamic_slice_in_dim(groups_gkf, first, min(TILE, neurons), 2)

    def group(rows_nf, pair):
      product = jnp.matmul(pair[0].T, pair[1], precision='highest')
      return rows_nf + jnp.minimum(product, 1), None

    start = jax.lax.dynamic_slice_in_dim(sum_ff, first, min(TILE, neurons), 0)
    return jax.lax.scan(group, start, (rows_gkn, groups_gkf))[0]

  # The last tile ends at the last neuron, over rows of the one before it.
  firsts = np.minimum(np.arange(0, neurons, TILE), max(neurons - TILE, 0))
  tiles = jax.lax.map(tile, jnp.asarray(firsts))
  owned = (firsts[:, None] + np.arange(min(TILE, neurons))).reshape(-1)
  source = np.unique(owned, return_index=True)[1]
  return tiles.reshape(-1, neurons)[source]


def reference_edges(adjacency_ff: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The graph that the published code gives to METIS.

  The threshold is 0.99 of the first percentile of all entries, of the 10th, 20th, ..., that is not
  0. A weight is the whole number of thresholds in an entry off the diagonal; below 1 is no edge.

  Returns:
    (rows, columns, weights), int32 each, both directions of an edge, by row and then by column.

  Raises:
    UserError: no entry is positive.
  """
  matrix = _checked(adjacency_ff)
  limit = threshold(matrix)
  scaled = matrix / np.float32(0.99 * limit)
  np.fill_diagonal(scaled, 0)
  rows, columns = np.nonzero(scaled >= 1)
  weights = np.minimum(np.floor(scaled[rows, columns]), np.iinfo(np.int32).max // 2)
  return rows.astype(np.int32), columns.astype(np.int32), weights.astype(np.int32)


def threshold(adjacency_ff: np.ndarray) -> float:
  """The percentile that the published graph starts from; see `reference_edges`."""
  found = np.percentile(np.asarray(adjacency_ff, np.float32), range(10, 101, 10))
  if not found[-1] > 0:
    raise UserError('no neuron is active for any token: there is no graph to cut into experts')
  return float(found[found > 0][0])


def intra_fraction(adjacency_ff: np.ndarray, labels_f: np.ndarray) -> float:
  """Share of the weight off the diagonal that lies inside experts; 0 where there is no weight."""
  matrix, labels = np.asarray(adjacency_ff), np.asarray(labels_f)
  diagonal = float(np.diagonal(matrix).sum(dtype=np.float64))
  total = float(matrix.sum(dtype=np.float64)) - diagonal
  inside = -diagonal
  for label in np.unique(labels):
    members = np.flatnonzero(labels == label)
    inside += float(matrix[np.ix_(members, members)].sum(dtype=np.float64))
  return inside / total if total > 0 else 0.0


def partition(
    adjacency_ff: np.ndarray, experts: int, seed: int = 0, method: str = 'auto'
) -> np.ndarray:
  """Experts of equal size with much of the weight inside them, labels int32 [f].

  Args:
    adjacency_ff: weights, not negative, as of `adjacency`; the diagonal does not matter.
    method: 'metis' needs pymetis, 'own' nothing; 'auto' takes METIS where there is pymetis.

  Raises:
    UserError: neurons that do not make experts of equal size, a matrix that is no graph, another
      method, or no pymetis.
  """
  matrix = _checked(adjacency_ff)
  neurons = len(matrix)
  if experts < 1 or neurons % experts:
    raise UserError(f'{neurons} neurons do not make {experts} experts of equal size')
  if method not in METHODS:
    raise UserError(f'method {method!r}: {" or ".join(map(repr, METHODS))}')
  metis = None if method == 'own' else _metis(required=method == 'metis')
  matrix = (matrix + matrix.T) / 2
  weights = _without_diagonal(matrix)
  if experts in (1, neurons) or not weights.any():
    return (np.arange(neurons) // (neurons // experts)).astype(np.int32)
  if metis is None:
    return _own(weights, experts, np.random.default_rng(seed))
  return refine(weights, repair(weights, _by_metis(metis, matrix, experts, seed), experts))


def repair(adjacency_ff: np.ndarray, labels_f: np.ndarray, experts: int) -> np.ndarray:
  """Labels of equal counts: one by one, the neuron that loses least leaves an expert with too many
  for one with too few, int32 [f]."""
  labels = np.array(labels_f, np.int32)
  size, matrix = len(labels) // experts, _without_diagonal(adjacency_ff)
  affinity = _affinity(adjacency_ff, labels, experts)
  counts = np.bincount(labels, minlength=experts)
  while (counts > size).any():
    movers, open_ = np.flatnonzero(counts[labels] > size), np.flatnonzero(counts < size)
    gain = affinity[np.ix_(open_, movers)] - affinity[labels[movers], movers]
    place, who = np.unravel_index(gain.argmax(), gain.shape)
    neuron, new, old = movers[who], open_[place], labels[movers[who]]
    affinity[old] -= matrix[neuron]
    affinity[new] += matrix[neuron]
    labels[neuron] = new
    counts[old] -= 1
    counts[new] += 1
  return labels


def refine(adjacency_ff: np.ndarray, labels_f: np.ndarray, sweeps: int = SWEEPS) -> np.ndarray:
  """Each neuron in turn trades places with the one that adds most weight inside experts, while any
  trade adds some, int32 [f]. Counts stay as they are, and the weight inside never falls.

  Args:
    adjacency_ff: symmetric, not negative. sweeps: times each neuron is looked at, at most.
  """
  labels = np.array(labels_f, np.int32)
  affinity = _affinity(adjacency_ff, labels, int(labels.max(initial=0)) + 1)
  matrix = _without_diagonal(adjacency_ff)
  every = np.arange(len(labels))
  own = affinity[labels, every]
  tolerance = 1e-9 * max(own.max(initial=0), 1e-300)
  for _ in range(sweeps):
    before = labels.copy()
    for i in every:
      a, row = labels[i], matrix[i]
      gain = affinity[:, i][labels] + affinity[a]
      gain -= own
      gain -= 2 * row
      j = int(gain.argmax())
      if gain[j] - own[i] <= tolerance:
        continue
      b, change = labels[j], matrix[j] - row
      affinity[a] += change
      affinity[b] -= change
      labels[i], labels[j] = b, a
      own = affinity[labels, every]
    if np.array_equal(before, labels):
      break
  return labels


def _affinity(adjacency_ff, labels_f, experts):
  """Weight between each expert's members and each neuron, itself left out, float64 [e, f]."""
  matrix = np.asarray(adjacency_ff)
  member_ef = (np.arange(experts)[:, None] == labels_f[None]).astype(matrix.dtype)
  out = (member_ef @ matrix).astype(np.float64)
  out[labels_f, np.arange(len(labels_f))] -= np.diagonal(matrix)
  return out


def _metis(required):
  """The package pymetis, or None where there is none and it is not required."""
  try:
    import pymetis
  except ImportError as error:
    if required:
      raise UserError("method 'metis' needs pymetis: pip install pymetis") from error
    return None
  return pymetis


def _by_metis(pymetis, adjacency_ff, experts, seed):
  rows, columns, weights = reference_edges(adjacency_ff)
  # METIS adds up weights in 32 bits.
  weights = np.maximum(weights // (weights.sum(dtype=np.int64) // 2**30 + 1), 1)
  starts = np.searchsorted(rows, np.arange(len(adjacency_ff) + 1))
  options = pymetis.Options(seed=seed)
  kind = pymetis.zero_copy_dtype()
  graph = pymetis.CSRAdjacency(starts.astype(kind), columns.astype(kind))
  found = pymetis.part_graph(experts, graph, eweights=weights.astype(kind), options=options)
  return np.asarray(found[1], np.int32)


def _own(weights_ff, experts, rng):
  """The best of a few refined starts; labels int32 [f]. The diagonal is zero.

  A small graph is also cut into twice as many parts, and these, as neurons, are cut in turn: that
  finds which clusters belong together, which trades of single neurons do not.
  """
  neurons = len(weights_ff)
  if experts == neurons:
    return np.arange(neurons, dtype=np.int32)
  small = neurons <= SMALL
  starts = [_spectral(weights_ff, experts, rng) for _ in range(RESTARTS if small else 1)]
  if small and neurons > 2 * experts and neurons % (2 * experts) == 0:
    halves = _spectral(weights_ff, 2 * experts, rng)
    member_ef = (np.arange(2 * experts)[:, None] == halves[None]).astype(np.float32)
    coarse = _without_diagonal(member_ef @ weights_ff @ member_ef.T)
    starts.append(_own(coarse, experts, rng)[halves])
  found = [refine(weights_ff, labels) for labels in starts]
  return max(found, key=lambda labels: intra_fraction(weights_ff, labels))


def _spectral(adjacency_ff, experts, rng, rounds=10):
  """Balanced k-means on the leading eigenvectors of the normalised graph, labels int32 [f]."""
  degree = adjacency_ff.sum(1, dtype=np.float64)
  scale = np.where(degree > 0, 1 / np.sqrt(np.maximum(degree, 1e-300)), 0).astype(np.float32)
  normal = adjacency_ff * scale[:, None] * scale[None]
  place = _leading(normal, experts, rng)
  place /= np.maximum(np.linalg.norm(place, axis=1, keepdims=True), 1e-12)
  distance = lambda centres: ((centres**2).sum(1)[None] - 2 * place @ centres.T)
  centres = place[rng.integers(len(place))][None]
  while len(centres) < experts:
    near = np.maximum((distance(centres) + 1).min(1), 0)
    centres = np.concatenate([centres, place[near.argmax()][None]])
  labels = None
  for _ in range(rounds):
    found = shared_split_core.assign(distance(centres))
    if labels is not None and np.array_equal(found, labels):
      break
    labels = found
    centres = np.stack([place[labels == e].mean(0) for e in range(experts)])
  return labels


def _leading(symmetric_ff, count, rng, rounds=10):
  """Eigenvectors of about the `count` largest eigenvalues, float64 [f, count]; fewer of a matrix of
  lower rank."""
  width = min(count + 8, len(symmetric_ff))
  product = lambda basis: np.asarray(symmetric_ff @ basis.astype(np.float32), np.float64)
  basis = _orthonormal(rng.normal(size=(len(symmetric_ff), width)))
  for _ in range(rounds):
    basis = _orthonormal(product(basis))
  _, vectors = np.linalg.eigh(basis.T @ product(basis))
  return basis @ vectors[:, -count:]


def _orthonormal(columns):
  values, vectors = np.linalg.eigh(columns.T @ columns)
  kept = values > 1e-10 * values.max()
  return columns @ (vectors[:, kept] / np.sqrt(values[kept]))


def _without_diagonal(matrix_ff):
  out = np.array(matrix_ff)
  np.fill_diagonal(out, 0)
  return out


def _checked(adjacency_ff):
  """The matrix in float32, or an error if it is not a graph's."""
  matrix = np.asarray(adjacency_ff, np.float32)
  if matrix.ndim != 2 or not len(matrix) or matrix.shape[0] != matrix.shape[1]:
    raise UserError(f'co-activation of shape {matrix.shape}: give [neurons, neurons]')
  if not np.isfinite(matrix).all() or (matrix < 0).any():
    raise UserError('co-activation holds NaN, infinity or values below 0: check the hidden values')
  return matrix
