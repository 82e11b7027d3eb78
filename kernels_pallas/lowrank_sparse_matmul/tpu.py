"""The product on TPU (Mosaic) in two kernels: x times left and kept, then what is made of them.

The first reads x once for both. The second puts the kept outputs in their places by a product with
a matrix of zeros and ones, made where it is used; as the outputs rise, a tile of outputs meets only
a few of the chunks of 128 kept ones, and the others are passed over.
"""

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata
import jax.numpy as jnp

from kernels_pallas.grouped_matmul import tpu as grouped
from kernels_pallas.ternary_matmul import tpu as ternary

LANES = 128
ROWS = ternary.ROWS
MOST_ROWS = 128
WIDE = 512  # Outputs a tile.
STEP_BYTES = 4 << 20  # Weights of a grid step of the first kernel; the next step's are read then.
MOST_BYTES = 48 << 20


def _lanes(n: int) -> int:
  return -(-n // LANES) * LANES


def _rows(m: int, e: int) -> int:
  """Rows a tile."""
  return -(-m // ROWS) * ROWS if m <= MOST_ROWS else grouped.row_tile(m, e)


def depth(d: int, columns: int, itemsize: int) -> int:
  """Inputs a tile: all, if they fit, else the most 128s that divide d; else the last is masked."""
  limit = max(STEP_BYTES // (columns * itemsize) // LANES, 1) * LANES
  return grouped.lane_tile(d, limit)


def supports(
    m: int, d: int, f: int, r: int, s: int, e: int, dtype: Any, weight_dtype: Any = None
) -> str:
  """Why the kernels do not take a product of `dtype` rows; '' if they do."""
  held = jnp.dtype(dtype if weight_dtype is None else weight_dtype)
  for name, given in (('x', jnp.dtype(dtype)), ('the weights are', held)):
    if given not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
      return f'{name} {"is " if name == "x" else ""}{given}, not bfloat16 or float32'
  if not (m and d and f and r and s and e):
    return f'nothing to multiply: m = {m}, d = {d}, f = {f}, r = {r}, s = {s}, {e} experts'
  if f == 1:
    return 'one output'  # Which the compiler does not take in bfloat16.
  rows, columns = _rows(m, e), _lanes(r) + _lanes(s)
  deep = _lanes(depth(d, columns, held.itemsize))
  first = 2 * (rows * deep * 4 + deep * columns * held.itemsize) + 3 * rows * columns * 4
  second = 2 * (rows * columns * 4 + _lanes(r) * WIDE * held.itemsize) + 4 * rows * WIDE * 4
  needed = max(first, second)
  if needed > MOST_BYTES:
    return f'{needed >> 20} MiB of vector memory are needed, more than {MOST_BYTES >> 20}'
  return ''


def _exact(dtype: Any) -> Any:
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _project_kernel(
    offsets_ref, groups_ref, tiles_ref, x_ref, left_ref, kept_w_ref, low_ref, kept_ref, low_sum,
    kept_sum, *, inputs: int,
):
  visit, k = pl.program_id(0), pl.program_id(1)

  @pl.when(k == 0)
  def _():
    low_sum[...] = jnp.zeros_like(low_sum)
    kept_sum[...] = jnp.zeros_like(kept_sum)

  x = x_ref[...]
  for w_ref, sum_ref in ((left_ref, low_sum), (kept_w_ref, kept_sum)):
    w = w_ref[...].astype(x.dtype)
    if inputs % w.shape[0]:
      row = jax.lax.broadcasted_iota(jnp.int32, w.shape, 0)
      w = jnp.where(row < inputs - k * w.shape[0], w, 0)
    sum_ref[...] += jnp.dot(
        x, w, preferred_element_type=jnp.float32, precision=_exact(x.dtype)
    )

  @pl.when(k == pl.num_programs(1) - 1)
  def _():
    for made_ref, sum_ref in ((low_ref, low_sum), (kept_ref, kept_sum)):
      own = ternary.own_rows(offsets_ref, groups_ref, tiles_ref, sum_ref.shape, visit=visit)
      old = made_ref[...].astype(jnp.float32)
      made_ref[...] = jnp.where(own, sum_ref[...], old).astype(made_ref.dtype)


def _expand_kernel(
    offsets_ref, groups_ref, tiles_ref, first_ref, last_ref, low_ref, kept_ref, right_ref,
    index_ref, y_ref, sum_ref, *, chunks: int,
):
  tile, visit = pl.program_id(0), pl.program_id(1)
  low = low_ref[...]
  wide = sum_ref.shape[1]
  sum_ref[...] = jnp.dot(
      low, right_ref[...].astype(low.dtype), preferred_element_type=jnp.float32,
      precision=_exact(low.dtype),
  )
  begin = tile * wide

  def chunk(c, nothing):
    at = groups_ref[visit] * chunks + c

    @pl.when((first_ref[at] < begin + wide) & (last_ref[at] >= begin))
    def _():
      output = begin + jax.lax.broadcasted_iota(jnp.int32, (wide, LANES), 0)
      place = jnp.where(output == index_ref[pl.ds(c, 1), :], 1.0, 0.0).astype(low.dtype)
      sum_ref[...] += jax.lax.dot_general(
          kept_ref[c], place, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32,
          precision=_exact(low.dtype),
      )

    return nothing

  jax.lax.fori_loop(0, chunks, chunk, 0)
  own = ternary.own_rows(offsets_ref, groups_ref, tiles_ref, sum_ref.shape, visit=visit)
  old = y_ref[...].astype(jnp.float32)
  y_ref[...] = jnp.where(own, sum_ref[...], old).astype(y_ref.dtype)


def _visits(group_sizes_e: jax.Array, total: int, rows: int) -> tuple[Any, jax.Array]:
  return make_group_metadata(
      group_sizes=group_sizes_e.astype(jnp.int32), m=total, tm=rows, start_group=jnp.int32(0),
      num_nonzero_groups=group_sizes_e.shape[0], visit_empty_groups=False,
  )


_PARAMS = functools.partial(pltpu.CompilerParams, vmem_limit_bytes=MOST_BYTES)


def _project(x_md, left_edr, kept_eds, group_sizes_e, rows, interpret) -> list[jax.Array]:
  """x left and x kept, [m, r] and [m, s]; m is whole tiles, rows of no group are undefined."""
  (m, d), r, s = x_md.shape, left_edr.shape[2], kept_eds.shape[2]
  deep = depth(d, _lanes(r) + _lanes(s), left_edr.dtype.itemsize)
  steps = -(-d // deep)
  x_md = jnp.pad(x_md, ((0, 0), (0, steps * deep - d)))
  given, visits = _visits(group_sizes_e, m, rows)
  weight = lambda n: pl.BlockSpec(
      (None, deep, n), lambda v, k, offsets, groups, tiles: (groups[v], k, 0)
  )
  made = lambda n: pl.BlockSpec((rows, n), lambda v, k, offsets, groups, tiles: (tiles[v], 0))
  return pl.pallas_call(
      functools.partial(_project_kernel, inputs=d),
      out_shape=[jax.ShapeDtypeStruct((m, n), x_md.dtype) for n in (r, s)],
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=3,
          grid=(visits, steps),
          in_specs=[
              pl.BlockSpec((rows, deep), lambda v, k, offsets, groups, tiles: (tiles[v], k)),
              weight(r), weight(s),
          ],
          out_specs=[made(r), made(s)],
          scratch_shapes=[pltpu.VMEM((rows, n), jnp.float32) for n in (r, s)],
      ),
      compiler_params=_PARAMS(dimension_semantics=('arbitrary', 'arbitrary')),
      interpret=interpret,
      name='lowrank_sparse_project',
  )(*given, x_md, left_edr, kept_eds)


def _expand(low_mr, kept_ms, right_erf, index_es, group_sizes_e, rows, interpret) -> jax.Array:
  """[m, f]; m is whole tiles, rows of no group are undefined."""
  (m, r), (e, _, f), s = low_mr.shape, right_erf.shape, index_es.shape[1]
  chunks = _lanes(s) // LANES
  index_ecl = jnp.pad(
      index_es.astype(jnp.int32), ((0, 0), (0, chunks * LANES - s)), constant_values=f
  ).reshape(e, chunks, LANES)
  first_ec = index_ecl[:, :, 0]
  last_ec = jnp.where(index_ecl < f, index_ecl, -1).max(-1)
  kept_cml = jnp.pad(kept_ms.astype(low_mr.dtype), ((0, 0), (0, chunks * LANES - s)))
  kept_cml = kept_cml.reshape(m, chunks, LANES).swapaxes(0, 1)
  given, visits = _visits(group_sizes_e, m, rows)
  wide = min(f, WIDE)
  return pl.pallas_call(
      functools.partial(_expand_kernel, chunks=chunks),
      out_shape=jax.ShapeDtypeStruct((m, f), low_mr.dtype),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=5,
          grid=(-(-f // wide), visits),
          in_specs=[
              pl.BlockSpec((rows, r), lambda n, v, offsets, groups, tiles, *_: (tiles[v], 0)),
              pl.BlockSpec(
                  (chunks, rows, LANES), lambda n, v, offsets, groups, tiles, *_: (0, tiles[v], 0)
              ),
              pl.BlockSpec(
                  (None, r, wide), lambda n, v, offsets, groups, tiles, *_: (groups[v], 0, n)
              ),
              pl.BlockSpec(
                  (None, chunks, LANES), lambda n, v, offsets, groups, *_: (groups[v], 0, 0)
              ),
          ],
          out_specs=pl.BlockSpec(
              (rows, wide), lambda n, v, offsets, groups, tiles, *_: (tiles[v], n)
          ),
          scratch_shapes=[pltpu.VMEM((rows, wide), jnp.float32)],
      ),
      compiler_params=_PARAMS(dimension_semantics=('parallel', 'arbitrary')),
      interpret=interpret,
      name='lowrank_sparse_expand',
  )(*given, first_ec.reshape(-1), last_ec.reshape(-1), low_mr, kept_cml, right_erf, index_ecl)


@functools.partial(jax.jit, static_argnames=('interpret',))
def project(
    x_md: jax.Array, left_edr: jax.Array, kept_eds: jax.Array, group_sizes_e: jax.Array, *,
    interpret: bool = False,
) -> list[jax.Array]:
  """x left and x kept in x's dtype, [m, r] and [m, s]; rows of no group are undefined."""
  m, rows = len(x_md), _rows(len(x_md), len(group_sizes_e))
  made = _project(
      _whole_tiles(x_md, rows), left_edr, kept_eds, group_sizes_e, rows, interpret
  )
  return [a[:m] for a in made]


def _inside(y_mf: jax.Array, m: int, group_sizes_e: jax.Array) -> jax.Array:
  inside = (jnp.arange(m) < group_sizes_e.sum())[:, None]
  return jnp.where(inside, y_mf[:m], jnp.zeros((), y_mf.dtype))


def _whole_tiles(x_mn: jax.Array, rows: int) -> jax.Array:
  return jnp.pad(x_mn, ((0, -len(x_mn) % rows), (0, 0)))


@functools.partial(jax.jit, static_argnames=('interpret',))
def lowrank_sparse_matmul(
    x_md: jax.Array, left_edr: jax.Array, right_erf: jax.Array, kept_eds: jax.Array,
    index_es: jax.Array, group_sizes_e: jax.Array, *, interpret: bool = False,
) -> jax.Array:
  """See `api.lowrank_sparse_matmul`."""
  low_mr, kept_ms = project(x_md, left_edr, kept_eds, group_sizes_e, interpret=interpret)
  return expand(low_mr, kept_ms, right_erf, index_es, group_sizes_e, interpret=interpret)


@functools.partial(jax.jit, static_argnames=('interpret',))
def expand(
    low_mr: jax.Array, kept_ms: jax.Array, right_erf: jax.Array, index_es: jax.Array,
    group_sizes_e: jax.Array, *, interpret: bool = False,
) -> jax.Array:
  """See `api.expand`."""
  m, rows = len(low_mr), _rows(len(low_mr), len(group_sizes_e))
  y_mf = _expand(
      _whole_tiles(low_mr, rows), _whole_tiles(kept_ms, rows), right_erf, index_es, group_sizes_e,
      rows, interpret,
  )
  return _inside(y_mf, m, group_sizes_e)
