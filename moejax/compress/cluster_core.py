"""Neurons of alike weights in experts of equal size: the parameter clustering of MoEfication.

arXiv 2110.01786, 3.1: the rows of a layer's first matrix, each of unit length, are clustered into
groups of exactly S = f / e neurons. With equal sizes the sum of squared distances to the means is
the rows' squared lengths less those of the experts' sums, divided by S; so a balanced assignment
to given means is a linear one, and what an exchange of two neurons gains is known from inner
products. Labels are int32 [f], each below the number of experts e.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from moejax.errors import UserError

# Inner products of all rows are held up to this many rows (64 MiB), and computed in blocks above.
HELD_ROWS = 4096
BLOCK_ROWS = 512
# Of two experts, at most so many neurons each are exchanged before all are looked at again.
VISIT_ROWS = 256
VISIT_PAIRS = 16
MOST_STARTS = 16


def normalised(rows_fd: jax.typing.ArrayLike) -> np.ndarray:
  """Rows of unit L2 length, float32 [f, d]; rows of zeros stay.

  Raises:
    UserError: not [f, d], or not all numbers are finite as float32.
  """
  rows = _checked_rows(rows_fd).astype(np.float64)
  lengths = np.linalg.norm(rows, axis=1, keepdims=True)
  return (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def objective(rows_fd: jax.typing.ArrayLike, labels_f: jax.typing.ArrayLike) -> float:
  """Sum of squared distances of rows [f, d] to the mean of their label's, in float64."""
  rows, labels = np.asarray(rows_fd, np.float64), np.asarray(labels_f)
  _, labels, sizes = np.unique(labels, return_inverse=True, return_counts=True)
  member = sparse.csr_array((np.ones(len(rows)), (labels, np.arange(len(rows)))))
  means = (member @ rows) / sizes[:, None]
  return float(np.square(rows - means[labels]).sum())


def expert_size(d_ff: int, experts: int) -> int:
  """Neurons of each of `experts` equal experts.

  Raises:
    UserError: `experts` is below 1 or does not divide d_ff.
  """
  if experts < 1 or d_ff % experts:
    counts = [n for n in range(1, d_ff + 1) if d_ff % n == 0]
    raise UserError(
        f'd_ff {d_ff} does not split into experts={experts} of equal size: experts may be '
        + (', '.join(map(str, counts)) or 'none')
    )
  return d_ff // experts


def balanced_kmeans(
    rows_fd: jax.typing.ArrayLike, experts: int, *, starts: int | None = None, seed: int = 0,
    refine: bool = True, init_labels: jax.typing.ArrayLike | None = None,
) -> np.ndarray:
  """Labels of experts of equal size around whose means the rows lie closest, int32 [f].

  Greedy k-means++, Lloyd's steps with a balanced assignment, then `swap_refine` until a round
  lowers the objective by less than 1e-4 of it; the best of all starts. Rows are taken as they are:
  MoEfication's are `normalised`. One seed gives one result. Memory is a few times f (d + e)
  numbers, and f^2 up to 4096 rows.

  Args:
    rows_fd: float [f, d].
    starts: how often to start anew; None for as many as are quick, one above 2048 rows.
    refine: whether neurons are exchanged after Lloyd's steps.
    init_labels: labels [f] to start from, in place of the first start, and the only one where
      `starts` is None; the result is never worse.

  Raises:
    UserError: `experts` does not divide f, rows are not [f, d] or not finite, `starts` is below 1,
      or `init_labels` are not of equal size.
  """
  rows = _checked_rows(rows_fd)
  size = expert_size(len(rows), experts)
  if starts is None:
    starts = max(1, min(MOST_STARTS, HELD_ROWS // len(rows))) if init_labels is None else 1
  if starts < 1:
    raise UserError(f'starts={starts}: at least 1')
  given = None if init_labels is None else _checked_labels(init_labels, len(rows), experts)
  if experts == 1 or size == 1:
    return np.arange(len(rows), dtype=np.int32) // size if given is None else given
  rows, gram_ff = _prepared(rows)
  found = [] if given is None else [given]
  for start in range(starts):
    labels = given
    if start or labels is None:
      chosen = _plus_plus(rows, gram_ff, experts, np.random.default_rng([seed, start]))
      labels = balanced_assignment(rows @ rows[chosen].T, size)
    labels = _lloyd(rows, labels, experts, 1e-4 if refine else 1e-6)
    found.append(_refined(rows, gram_ff, labels, experts, least=1e-4) if refine else labels)
  return min(found, key=lambda labels: objective(rows, labels))


def swap_refine(
    rows_fd: jax.typing.ArrayLike, labels_f: jax.typing.ArrayLike, experts: int,
    max_rounds: int = 1000,
) -> np.ndarray:
  """Exchanges neurons of two experts while that lowers the `objective`, which never grows.

  Every round finds each neuron's best exchange; pairs of experts are then visited by what they
  gain, those without a common expert side by side, and exchange until nothing gains. It ends
  where no exchange gains (gains below 1e-6 of the longest row's square do not count). Takes float
  [f, d] and int [f], gives int32 [f]; raises as `balanced_kmeans`.
  """
  rows = _checked_rows(rows_fd)
  alone = experts == 1 or expert_size(len(rows), experts) == 1
  labels = _checked_labels(labels_f, len(rows), experts)
  return labels if alone else _refined(*_prepared(rows), labels, experts, max_rounds)


def balanced_assignment(scores_fe: np.ndarray, size: int) -> np.ndarray:
  """`size` rows for each column, of nearly the greatest sum of scores, int32 [f].

  Bertsekas' auction for objects that come in several copies: rows bid for columns, which keep
  the `size` highest bids. The sum is within f * 1e-4 * (the spread of scores) of the greatest.
  """
  scores = np.asarray(scores_fe, np.float64)
  rows, columns = scores.shape
  least = 1e-4 * float(np.ptp(scores))
  if columns == 1 or not least:
    return np.arange(rows, dtype=np.int32) // size
  prices, step = np.zeros(columns), 1000 * least
  while True:
    labels, bids = np.full(rows, -1), np.zeros(rows)
    free = np.arange(rows)
    while len(free):
      worth = scores[free] - prices
      choice, each = worth.argmax(1), np.arange(len(free))
      top = worth[each, choice]
      worth[each, choice] = -np.inf
      bids[free] = prices[choice] + top - worth.max(1) + step
      labels[free] = choice
      wanted = np.zeros(columns + 1, bool)
      wanted[choice] = True
      held = np.flatnonzero(wanted[labels])
      held = held[np.lexsort((-bids[held], labels[held]))]
      rank = np.arange(len(held)) - np.searchsorted(labels[held], np.arange(columns))[labels[held]]
      full = held[rank == size - 1]
      prices[labels[full]] = bids[full]
      free = held[rank >= size]
      labels[free] = -1
    if step <= least:
      return labels.astype(np.int32)
    step = max(step / 5, least)


def _prepared(rows: np.ndarray) -> tuple[np.ndarray, jax.Array | None]:
  """Rows scaled so that squares stay in range, and their inner products where these can be held."""
  rows = rows / (np.abs(rows).max() or 1)
  return rows, _products(rows, rows) if len(rows) <= HELD_ROWS else None


def _plus_plus(rows: np.ndarray, gram_ff: Any, count: int, rng: np.random.Generator) -> np.ndarray:
  """Greedy k-means++: `count` rows, each the best of 2 + ln(count) drawn by squared distance."""
  squares = np.einsum('fd,fd->f', rows, rows)
  held = None if gram_ff is None else np.asarray(gram_ff)
  chosen: list[int] = []
  nearest = np.full((len(rows), 1), np.inf, np.float32)
  tried = rng.integers(len(rows), size=1)
  while True:
    inner = rows @ rows[tried].T if held is None else held[tried].T
    away = np.minimum(nearest, np.maximum(squares[:, None] + squares[tried] - 2 * inner, 0))
    best = int(away.sum(0).argmin())
    nearest = away[:, best : best + 1]
    chosen.append(int(tried[best]))
    if len(chosen) == count:
      return np.array(chosen)
    mass = np.cumsum(nearest[:, 0], dtype=np.float64)
    draws = rng.random(2 + int(np.log(count))) * mass[-1]
    tried = np.minimum(np.searchsorted(mass, draws, side='right'), len(rows) - 1)


def _lloyd(rows: np.ndarray, labels: np.ndarray, experts: int, least: float) -> np.ndarray:
  """Means and assignments in turn, until the objective falls by less than a share `least`."""
  size = len(rows) // experts
  squares = float(np.square(rows, dtype=np.float64).sum())
  best, now = labels, np.inf
  while True:
    means = rows[_members(labels, experts)].mean(1)
    before, now = now, squares - size * float(np.square(means, dtype=np.float64).sum())
    if now < before:
      best = labels
    if now >= before * (1 - least):
      return best
    labels = balanced_assignment(rows @ means.T, size)


def _refined(
    rows: np.ndarray, gram_ff: Any, labels: np.ndarray, experts: int,
    max_rounds: int = 1000, least: float = 0.0,
) -> np.ndarray:
  """`swap_refine` until a round lowers the objective by at most the share `least` of it."""
  on_device, members = jnp.asarray(rows), _members(labels, experts)
  size = members.shape[1]
  most = float(np.einsum('fd,fd->f', rows, rows).max())
  tolerance = 1e-6 * most * (size + 4)
  given = objective(rows, labels)
  open_, lowest = np.ones(experts, bool), -np.inf
  for _ in range(max_rounds):
    gain, partner, low = _best_swaps(on_device, gram_ff, members, open_, lowest)
    # The first round alone has seen all inner products.
    lowest = low if lowest == -np.inf else lowest
    if size > VISIT_ROWS:
      members = np.take_along_axis(members, np.argsort(-gain[members], 1, kind='stable'), 1)
    open_[:] = False
    owner = _labels(members)
    found = np.flatnonzero(gain > tolerance)
    gained = 0.0
    for one, other in _matchings(owner[found], owner[partner[found]], gain[found]):
      # An expert whose visit gains nothing may still gain with another one: both stay open.
      open_[one] = open_[other] = True
      gained += _visit_all(on_device, gram_ff, members, one, other, tolerance)
    if gained <= least * size * given:
      break
  refined = _labels(members)
  return refined if objective(rows, refined) < given else labels


def _best_swaps(
    rows: jax.Array, gram_ff: Any, members: np.ndarray, open_: np.ndarray, lowest: float
) -> tuple[np.ndarray, np.ndarray, float]:
  """What each row's best exchange gains [f], its partner [f], and the lowest inner product met.

  The gain is -inf in experts not open, and where none is possible above that `lowest` product.
  """
  owner = _labels(members)
  reach, bound = _reach(rows, members, owner)
  gain, partner = np.full(len(owner), -np.inf, np.float32), np.zeros(len(owner), np.int32)
  looked = np.flatnonzero(open_[owner] & (np.asarray(bound) > 2 * lowest))
  block, least = min(BLOCK_ROWS, len(owner)), np.inf
  for start in range(0, len(looked), block):
    some = np.resize(looked[start : start + block], block)
    gain[some], partner[some], low = _best_of_block(rows, gram_ff, reach, owner, some)
    least = min(least, float(low))
  return gain, partner, least


def _matchings(
    one: np.ndarray, other: np.ndarray, gain: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """All pairs of experts that occur, as sets without a common expert, the greatest gains first."""
  order = np.argsort(-gain, kind='stable')
  pairs = np.sort(np.stack([one[order], other[order]]), 0)
  pairs = pairs[:, np.sort(np.unique(pairs, axis=1, return_index=True)[1])]
  experts = int(pairs.max(initial=0)) + 1
  while pairs.size:
    left, taken = pairs, np.zeros(pairs.shape[1], bool)
    place, matched = np.arange(pairs.shape[1]), np.zeros(experts, bool)
    while place.size:
      first = np.full(experts, pairs.shape[1])
      for side in left:
        np.minimum.at(first, side, place)
      agreed = (first[left[0]] == place) & (first[left[1]] == place)
      taken[place[agreed]] = True
      matched[left[:, agreed].ravel()] = True
      keep = ~(matched[left[0]] | matched[left[1]])
      left, place = left[:, keep], place[keep]
    yield pairs[0, taken], pairs[1, taken]
    pairs = pairs[:, ~taken]


def _visit_all(
    rows: jax.Array, gram_ff: Any, members: np.ndarray, one: np.ndarray, other: np.ndarray,
    tolerance: float,
) -> float:
  """Exchanges within pairs of experts, changes `members` [e, s], and returns what was gained."""
  experts, size = members.shape
  used = min(size, VISIT_ROWS)
  most = max(1, min(experts // 2, VISIT_PAIRS))
  gained = 0.0
  for start in range(0, len(one), most):
    some = np.stack([one[start : start + most], other[start : start + most]], 1)
    count = len(some)
    padded = np.resize(some, (most, 2))
    further = rows[members[padded][:, :, used:]].sum(2) if used < size else None
    rest = None if further is None else further[:, 1] - further[:, 0]
    placed = members[padded][:, :, :used].reshape(len(padded), 2 * used)
    side, gain = (np.asarray(v)[:count] for v in _visit(rows, gram_ff, placed, rest, tolerance))
    order = np.argsort(side, 1, kind='stable')
    members[some, :used] = np.take_along_axis(placed[:count], order, 1).reshape(count, 2, used)
    gained += float(gain.sum())
  return gained


@jax.jit
def _products(a_md, b_nd):
  return jnp.matmul(a_md, b_nd.T, precision='highest')


@jax.jit
def _reach(rows_fd, members_es, owner_f):
  """Half of what the experts' squared sums gain where a row joins each expert, [f, e].

  And half a bound [f] on what any exchange of a row gains, but for the two rows' inner product.
  """
  sums_ed = rows_fd[members_es].sum(1)
  inner_fe = _products(rows_fd, sums_ed)
  own_f1 = jnp.take_along_axis(inner_fe, owner_f[:, None], 1)
  reach_fe = inner_fe - own_f1 + jnp.square(rows_fd).sum(1, keepdims=True)
  most_ee = reach_fe[members_es].max(1)
  both_fe = reach_fe + most_ee.T[owner_f]
  elsewhere = owner_f[:, None] != jnp.arange(len(members_es))[None]
  return reach_fe, jnp.where(elsewhere, both_fe, -jnp.inf).max(1)


@jax.jit
def _best_of_block(rows_fd, gram_ff, reach_fe, owner_f, rows_b):
  inner_bf = _products(rows_fd[rows_b], rows_fd) if gram_ff is None else gram_ff[rows_b]
  own_b = owner_f[rows_b]
  gain_bf = reach_fe[rows_b][:, owner_f] + reach_fe.T[own_b] - 2 * inner_bf
  gain_bf = jnp.where(own_b[:, None] == owner_f[None], -jnp.inf, gain_bf)
  best_b = gain_bf.max(1)
  # As argmax, which is slower on CPUs.
  place = jnp.where(gain_bf == best_b[:, None], jnp.arange(len(owner_f))[None], len(owner_f))
  return 2 * best_b, place.min(1), inner_bf.min()


@jax.jit
def _visit(rows_fd, gram_ff, placed_pn, rest_pd, tolerance):
  """The best exchange of each pair of experts, until none gains or after 4 n of them.

  `placed` are rows of one expert, then as many of the other, whose sums over further rows differ
  by `rest`. Returns -1 where a row is the one expert's, else 1, [p, n], and each pair's gain [p].
  """
  pairs, count = placed_pn.shape
  each, place = jnp.arange(pairs), jnp.arange(count)[None]
  if gram_ff is None:
    x = rows_fd[placed_pn]
    inner = jnp.einsum('pid,pjd->pij', x, x, precision='highest')
  else:
    inner = gram_ff[placed_pn[:, :, None], placed_pn[:, None]]
  squares = jnp.diagonal(inner, axis1=1, axis2=2)
  side = jnp.broadcast_to(jnp.where(place < count // 2, -1, 1).astype(inner.dtype), placed_pn.shape)
  # How much nearer a row is to the other expert's sum than to the one's.
  lean = jnp.einsum('pij,pj->pi', inner, side, precision='highest')
  if rest_pd is not None:
    lean += jnp.einsum('pid,pd->pi', rows_fd[placed_pn], rest_pd, precision='highest')

  def exchange(state):
    side, lean, gained, steps = state
    alone = squares - side * lean
    left, right = (jnp.where(side == s, alone, -jnp.inf) for s in (-1, 1))
    i = (left + (right[:, None] - 2 * inner).max(2)).argmax(1)
    to_i = right - 2 * inner[each, i]
    j = to_i.argmax(1)
    gain = 2 * (left[each, i] + to_i[each, j])
    does = gain > tolerance
    lean += jnp.where(does, 2.0, 0.0)[:, None] * (inner[each, i] - inner[each, j])
    moves = ((place == i[:, None]) | (place == j[:, None])) & does[:, None]
    gained += jnp.where(does, gain, 0)
    return jnp.where(moves, -side, side), lean, gained, jnp.where(does.any(), steps - 1, 0)

  state = (side, lean, jnp.zeros(pairs, inner.dtype), jnp.array(4 * count))
  side, _, gained, _ = jax.lax.while_loop(lambda state: state[3] > 0, exchange, state)
  return side, gained


def _members(labels: np.ndarray, experts: int) -> np.ndarray:
  """The rows of each expert, int32 [e, s]."""
  return np.argsort(labels, kind='stable').reshape(experts, -1).astype(np.int32)


def _labels(members: np.ndarray) -> np.ndarray:
  labels = np.empty(members.size, np.int32)
  labels[members] = np.arange(len(members), dtype=np.int32)[:, None]
  return labels


def _checked_rows(rows_fd: jax.typing.ArrayLike) -> np.ndarray:
  rows = np.asarray(rows_fd)
  if rows.ndim != 2 or not rows.size:
    raise UserError(f'rows to cluster have shape {rows.shape}: expected [d_ff, d]')
  with np.errstate(over='ignore'):
    rows = rows.astype(np.float32)
  if len(bad := np.flatnonzero(~np.isfinite(rows).all(1))):
    raise UserError(f'rows to cluster: {len(bad)} rows are not finite, the first is row {bad[0]}')
  return rows


def _checked_labels(labels_f: jax.typing.ArrayLike, rows: int, experts: int) -> np.ndarray:
  labels = np.asarray(labels_f)
  if not np.array_equal(np.sort(np.atleast_1d(labels)), np.arange(rows) // (rows // experts)):
    raise UserError(
        f'labels of shape {labels.shape} do not give each of {experts} experts '
        f'{rows // experts} of {rows} neurons'
    )
  return labels.astype(np.int32)
