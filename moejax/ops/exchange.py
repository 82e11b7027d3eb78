"""How tokens meet experts that lie on other devices of the mesh axis 'expert'.

Both ways run inside a region that is manual over that axis. Each device holds its own tokens and
its own experts; `compute(rows, group_sizes, pair)` runs a device's experts on rows sorted by
expert, where pair[i] is the number of row i's (token, choice) pair in the whole batch.

By gathering: every device of the axis sees all of their tokens and computes those of its experts;
the sums go back by a reduce-scatter. Nothing is dropped, nothing is padded, and no routing is
slower than another on the wire: (ways - 1) m d each way. GRIN's 16 experts need no more.

By all-to-all, as GShard (arXiv 2006.16668) and Switch (arXiv 2101.03961) do it: a device sends each
pair to the device of its expert, in a buffer of static size, and gets the output back the same
way: about k m d each way, whatever the number of ways.
"""

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp

from moejax.routing import dispatch

AXIS = 'expert'
Compute = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Travel = Callable[
    [Compute, jax.Array, jax.Array, jax.Array, jax.Array, int, int], tuple[jax.Array, jax.Array]
]


def by_gathering(
    compute: Compute, x_md: jax.Array, choice_mk: jax.Array, keep_mk: jax.Array,
    first: jax.Array, own: int, ways: int,
) -> tuple[jax.Array, jax.Array]:
  """Outputs [m, k, d] of this device's pairs, and keep_mk as it was.

  Args:
    compute: see the module. x_md, choice_mk, keep_mk: this device's tokens and pairs.
    first: number of this device's first pair. own: experts a device. ways: devices of the axis.
  """
  if ways == 1:
    number = lambda pair: pair + first
    fn = lambda rows, sizes, pair: compute(rows, sizes, number(pair))
    return dispatch.apply_experts(x_md, choice_mk, keep_mk, own, fn), keep_mk
  gather = lambda a: jax.lax.all_gather(a, AXIS, axis=0, tiled=True)
  x, choice, keep = gather(x_md), gather(choice_mk), gather(keep_mk)
  place = jax.lax.axis_index(AXIS)
  start = first - place * choice_mk.size
  choice = choice - own * place
  here = keep & (choice >= 0) & (choice < own)
  y = dispatch.apply_experts(
      x, jnp.where(here, choice, 0), here, own,
      lambda rows, sizes, pair: compute(rows, sizes, pair + start),
  )
  return jax.lax.psum_scatter(y, AXIS, scatter_dimension=0, tiled=True), keep_mk


def buffer_rows(pairs: int, ways: int, factor: float) -> int:
  """Rows that one device may send to another: factor times the even share; 0 for all pairs."""
  if factor == 0:
    return pairs
  return min(pairs, max(1, math.ceil(factor * pairs / ways)))


def by_all_to_all(factor: float) -> Travel:
  """The all-to-all way with buffers of factor times the even share, 0 for no drops at all.

  With a factor the later pairs of a device that has too many for one other device are dropped;
  the second return value says which pairs were computed.
  """

  def travel(compute, x_md, choice_mk, keep_mk, first, own, ways):
    if ways == 1:
      return by_gathering(compute, x_md, choice_mk, keep_mk, first, own, ways)
    pairs, k = choice_mk.size, choice_mk.shape[1]
    rows = buffer_rows(pairs, ways, factor)
    order, inverse, sizes = dispatch.sort_by_expert(choice_mk, keep_mk, own * ways)
    # Sorted by expert is sorted by device; a pair's rank among those of its device is its row.
    expert = jnp.where(keep_mk, choice_mk, own * ways).reshape(-1)[order]
    device = expert // own
    ends = jnp.cumsum(sizes.reshape(ways, own).sum(1))
    begin = jnp.concatenate([jnp.zeros(1, ends.dtype), ends])[jnp.minimum(device, ways)]
    rank = jnp.arange(pairs) - begin
    fits = (device < ways) & (rank < rows)
    slot = jnp.where(fits, device * rows + rank, ways * rows)

    def sent(values, empty):
      filled = jnp.full((ways * rows, *values.shape[1:]), empty, values.dtype)
      filled = filled.at[slot].set(values, mode='drop', unique_indices=True)
      return jax.lax.all_to_all(
          filled.reshape(ways, rows, *values.shape[1:]), AXIS, 0, 0, tiled=False
      ).reshape(ways * rows, *values.shape[1:])

    x = sent(dispatch.permute(x_md, order, inverse), 0)
    there = sent(expert % own, own)
    number = sent(order + first, 0)
    y = dispatch.apply_experts(
        x, jnp.minimum(there, own - 1)[:, None], (there < own)[:, None], own,
        lambda r, s, pair: compute(r, s, number[pair]),
    )[:, 0]
    y = jax.lax.all_to_all(y.reshape(ways, rows, -1), AXIS, 0, 0).reshape(ways * rows, -1)
    back = jnp.where(fits[:, None], y.at[slot].get(mode='fill', fill_value=0), 0)
    y_mkd = dispatch.unpermute(back, order, inverse).reshape(*choice_mk.shape, -1)
    return y_mkd, fits[inverse].reshape(-1, k)

  return travel
