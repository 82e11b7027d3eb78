"""A dense layer's neurons as shared ones and routed experts: CMoE (arXiv 2502.04416).

Each token marks the neurons with its largest hidden values. The neurons most often marked are
shared by every token. The next ones are the seeds of routed experts of equal size, to which the
others go by the distance of their columns of marks. One neuron stands for each expert: its own
hidden value is the expert's score. Weights are wi and gate [d, f]; ties go to the lower index.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import UserError

EPS = 1e-12


@dataclasses.dataclass(frozen=True)
class Split:
  """shared: neurons, int32 [n]. routed: neurons of each expert, int32 [e, s]. Both ascend.

  representatives: the neuron that stands for each expert, int32 [e].
  """

  shared: np.ndarray
  routed: np.ndarray
  representatives: np.ndarray


def hidden(x_md: np.ndarray, gate_df: np.ndarray, wi_df: np.ndarray) -> np.ndarray:
  """SwiGLU's hidden values of tokens and neurons that all have norm 1, float32 [m, f].

  As published: the inputs and each neuron's vectors are divided by their norm, zeros stay zeros.
  """
  gate, wi = (_unit(w, 'weights', 0) for w in (gate_df, wi_df))
  return np.asarray(_swiglu(_unit(x_md, 'inputs', 1), gate, wi))


def markers(hidden_mf: np.ndarray, count: int = 10) -> np.ndarray:
  """The `count` hidden values of each token that are largest in absolute value, bool [m, f].

  A value of zero is never marked, so a token may have fewer.

  Raises:
    UserError: `count` is not between 1 and f, or a value is not finite.
  """
  hidden_mf = _matrix(hidden_mf, 'hidden values')
  if not 1 <= count <= hidden_mf.shape[1]:
    raise UserError(f'{count} marks a token: between 1 and the {hidden_mf.shape[1]} neurons')
  found = np.zeros(hidden_mf.shape, bool)
  if found.size:
    top = jax.lax.top_k(jnp.abs(hidden_mf), count)[1]
    np.put_along_axis(found, np.asarray(top), True, 1)
  return found & (hidden_mf != 0)


def rates(markers_mf: np.ndarray) -> np.ndarray:
  """The share of tokens that mark each neuron, float32 [f].

  Raises:
    UserError: there are no tokens.
  """
  marks = np.asarray(markers_mf)
  if marks.ndim != 2 or not len(marks):
    raise UserError(f'marks of shape {marks.shape}: give [tokens, neurons] of one token or more')
  return (marks.sum(0, dtype=np.int64) / len(marks)).astype(np.float32)


def distances(markers_mf: np.ndarray, centres_me: np.ndarray, metric: str = 'l1') -> np.ndarray:
  """Distance of each neuron's column of marks to each centre, float64 [f, e].

  Args:
    centres_me: columns of marks, or means of such, each value between 0 and 1.
    metric: 'l1' (published code), or 'l2' (paper), the Euclidean distance.

  Raises:
    UserError: another metric.
  """
  marks, centres = np.asarray(markers_mf, np.float32), np.asarray(centres_me, np.float32)
  if metric not in ('l1', 'l2'):
    raise UserError(f"metric {metric!r}: 'l1' or 'l2'")
  # Marks are 0 or 1: |a - c| = a + c - 2 a c, and (a - c)^2 = a + c^2 - 2 a c.
  own = centres if metric == 'l1' else centres**2
  out = marks.sum(0, dtype=np.float64)[:, None] + own.sum(0, dtype=np.float64)[None]
  out = np.maximum(out - 2 * np.asarray(marks.T @ centres, np.float64), 0)
  return out if metric == 'l1' else np.sqrt(out)


def assign(cost_ne: np.ndarray) -> np.ndarray:
  """Labels of least total cost with n / e items for every label, int32 [n]; exact.

  Every item starts at its cheapest label. While a label has too many, one item moves along each
  step of the cheapest path from a label with too many to one with too few. The same optimum as an
  assignment on a matrix [n, n] of repeated columns, without that matrix.

  Raises:
    UserError: n is not a multiple of e, or a cost is not finite.
  """
  cost = _matrix(cost_ne, 'costs', np.float64)
  items, experts = cost.shape
  if not experts or items % experts:
    raise UserError(f'{items} items do not make {experts} parts of equal size')
  size, labels = items // experts, cost.argmin(1)
  counts = np.bincount(labels, minlength=experts)
  step, mover = np.full((experts, experts), np.inf), np.zeros((experts, experts), int)
  tolerance = 1e-12 * (1 + np.abs(cost).max(initial=0))

  def renew(label):
    """The cheapest move out of a label to each other, and the item that makes it."""
    members = np.flatnonzero(labels == label)
    if len(members):
      extra = cost[members] - cost[members, label][:, None]
      mover[label] = members[extra.argmin(0)]
      step[label] = extra.min(0)
    else:
      step[label] = np.inf
    step[label, label] = np.inf

  for label in range(experts):
    renew(label)
  while (counts > size).any():
    path = _cheapest_path(step, counts > size, counts < size, tolerance)
    moves = [(mover[a, b], b) for a, b in itertools.pairwise(path)]
    for item, label in moves:
      labels[item] = label
    counts[path[0]] -= 1
    counts[path[-1]] += 1
    for label in path:
      renew(label)
  return labels.astype(np.int32)


def _cheapest_path(step_ee, sources_e, targets_e, tolerance):
  """Labels from one of `sources_e` to one of `targets_e` of least total step (Bellman-Ford)."""
  best = np.where(sources_e, 0.0, np.inf)
  before = np.full(len(best), -1)
  for _ in range(len(best)):
    through = best[:, None] + step_ee
    via = through.argmin(0)
    reached = through[via, np.arange(len(best))]
    better = reached < best - tolerance
    better |= np.isinf(best) & np.isfinite(reached)
    if not better.any():
      break
    best, before = np.where(better, reached, best), np.where(better, via, before)
  path = [int(np.where(targets_e, best, np.inf).argmin())]
  while before[path[0]] >= 0:
    path.insert(0, int(before[path[0]]))
  return path


def split(
    markers_mf: np.ndarray, experts: int, shared: int, metric: str = 'l1', rounds: int = 1,
    seeds: np.ndarray | None = None,
) -> Split:
  """Shared neurons of the highest rates, and the others in experts of equal size.

  Args:
    markers_mf: bool [m, f]; see `markers`.
    experts: routed experts. shared: neurons that every token uses; 0 for none.
    metric: see `distances`.
    rounds: assignments at most. The first is to the seeds (published: the only one), later ones
      are to the means of the members, until nothing changes.
    seeds: a neuron for each expert; None for the ones of the highest rates that are not shared.

  Raises:
    UserError: the neurons left do not make so many experts of equal size, there are no tokens, or
      the seeds are not that many different ones.
  """
  rate = rates(markers_mf)
  neurons = len(rate)
  left = neurons - shared
  if not (0 <= shared < neurons and 1 <= experts <= left and left % experts == 0):
    raise UserError(
        f'{neurons} neurons less {shared} shared ones do not make {experts} experts of equal size'
    )
  if rounds < 1:
    raise UserError(f'{rounds} rounds of assignment: one or more')
  order = np.argsort(-rate, kind='stable')
  rest = np.sort(order[shared:])
  seeds = order[shared : shared + experts] if seeds is None else np.asarray(seeds)
  if len(seeds) != experts or len(np.intersect1d(seeds, rest)) != experts:
    raise UserError(f'seeds {seeds.tolist()}: {experts} different neurons that are not shared')
  marks = np.asarray(markers_mf)
  centres, routed = marks[:, seeds], np.zeros((0, 0), np.int32)
  for _ in range(rounds):
    labels = assign(distances(marks[:, rest], centres, metric))
    before, routed = routed, rest[np.argsort(labels, kind='stable').reshape(experts, -1)]
    if np.array_equal(before, routed):
      break
    centres = _means(marks, routed)
  ids = lambda a: a.astype(np.int32)
  return Split(ids(np.sort(order[:shared])), ids(routed), representatives(marks, routed, metric))


def representatives(
    markers_mf: np.ndarray, routed_es: np.ndarray, metric: str = 'l1'
) -> np.ndarray:
  """The member of each expert whose marks are closest to the members' mean, int32 [e]."""
  marks = np.asarray(markers_mf)
  means = _means(marks, routed_es)
  found = [
      row[distances(marks[:, row], mean[:, None], metric).argmin()]
      for row, mean in zip(np.asarray(routed_es), means.T)
  ]
  return np.array(found, np.int32)


def _means(marks_mf, routed_es):
  return np.stack([marks_mf[:, row].mean(1, dtype=np.float32) for row in routed_es], 1)


def router_probs(
    x_md: np.ndarray, gate_df: np.ndarray, wi_df: np.ndarray, representatives: np.ndarray
) -> np.ndarray:
  """Softmax over experts of their representatives' absolute hidden values, float32 [m, e].

  As published: the representatives' vectors have norm 1, the inputs keep theirs.
  """
  gate, wi = (_unit(np.asarray(w)[:, representatives], 'weights', 0) for w in (gate_df, wi_df))
  x_md = _matrix(x_md, 'inputs')
  return np.asarray(jax.nn.softmax(jnp.abs(_swiglu(x_md, gate, wi))))


@jax.jit
def _swiglu(x_md, gate_df, wi_df):
  product = lambda w: jnp.matmul(x_md, w, precision='highest')
  return jax.nn.silu(product(gate_df)) * product(wi_df)


def _unit(a, name, axis):
  a = _matrix(a, name)
  return a / np.maximum(np.linalg.norm(a, axis=axis, keepdims=True), np.float32(EPS))


def _matrix(a, name, dtype=np.float32):
  a = np.asarray(a, dtype)
  if a.ndim != 2:
    raise UserError(f'{name} of shape {a.shape}: give a matrix')
  if not np.isfinite(a).all():
    raise UserError(f'{name} hold NaN or infinity: check the inputs and weights they are made from')
  return a
