"""Chosen experts on TPU (Mosaic): the experts that any token chose are visited, in pieces of wi.

Their indices are prefetched, so that the blocks of the others are never read. Activation, mask and
down projection follow each piece of the up projection; sums stay in vector memory to the end.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from kernels_pallas.grouped_matmul import tpu as grouped

LANES = 128
ROWS = 16  # Rows of a bfloat16 register.
# Above so many rows the matrix unit takes longer than reading the weights.
MOST_ROWS = 256
# Bytes of the weights of one grid step; the next step's are read meanwhile.
STEP_BYTES = 4 << 20
# Vector memory that a kernel may ask for on every chip since v5.
MOST_BYTES = 48 << 20


def width(d: int, f: int, matrices: int, itemsize: int) -> int:
  """Neurons a step: all of an expert if they fit, else a multiple of 128, the widest that divides.

  Where none divides, the last piece is partly empty.
  """
  limit = max(STEP_BYTES // (matrices * d * itemsize) // LANES, 1) * LANES
  return grouped.lane_tile(f, limit)


def _vector_bytes(m: int, d: int, f: int, e: int, matrices: int, itemsize: int) -> int:
  """Vector memory of a call: weights, rows and choice twice, the sums, hidden units in float32."""
  lanes = lambda n: -(-n // LANES) * LANES
  rows, wide = -(-m // ROWS) * ROWS, lanes(width(d, f, matrices, itemsize))
  weights = 2 * matrices * lanes(d) * wide * itemsize
  return weights + rows * (lanes(d) * 24 + lanes(e) * 8 + wide * 4 * matrices)


def supports(
    m: int, d: int, f: int, e: int, dtype: Any, *, gated: bool, weight_dtype: Any = None
) -> str:
  """Why the kernel does not take a block of `dtype` rows; '' if it does.

  The weights are of the rows' dtype unless said.
  """
  held = jnp.dtype(dtype if weight_dtype is None else weight_dtype)
  for name, given in (('x', jnp.dtype(dtype)), ('wi', held)):
    if given not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
      return f'{name} is {given}, not bfloat16 or float32'
  if not (m and d and f and e):
    return f'nothing to compute: m = {m}, d = {d}, f = {f}, {e} experts'
  if m > MOST_ROWS:
    return f'{m} tokens, more than {MOST_ROWS}'
  needed = _vector_bytes(m, d, f, e, 3 if gated else 2, held.itemsize)
  if needed > MOST_BYTES:
    return f'{needed >> 20} MiB of vector memory are needed, more than {MOST_BYTES >> 20}'
  return ''


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
  exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jnp.dot(x, w.astype(x.dtype), preferred_element_type=jnp.float32, precision=exact)


def _kernel(
    ids_ref, x_ref, chosen_ref, *refs, names: tuple[str, ...], act: Callable[..., jax.Array],
    neurons: int,
):
  *weight_refs, y_ref, sum_ref = refs
  own = dict(zip(names, weight_refs))
  visit, piece = pl.program_id(0), pl.program_id(1)

  @pl.when((visit == 0) & (piece == 0))
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  def product(name):
    y = _dot(x_ref[...], own[name][...])
    bias = f'{name}_bias'
    return y + own[bias][...].astype(jnp.float32) if bias in own else y

  hidden = act(*(product(name) for name in ('wi', 'gate') if name in own))
  expert = jax.lax.broadcasted_iota(jnp.int32, chosen_ref.shape, 1) == ids_ref[visit]
  mine = jnp.max(jnp.where(expert, chosen_ref[...], 0.0), axis=1, keepdims=True)
  wide = hidden.shape[1]
  kept: Any = mine > 0
  wo = own['wo'][...].astype(x_ref.dtype)
  if neurons % wide:
    left = neurons - piece * wide
    kept = kept & (jax.lax.broadcasted_iota(jnp.int32, hidden.shape, 1) < left)
    inside: Any = jax.lax.broadcasted_iota(jnp.int32, wo.shape, 0) < left
    wo = jnp.where(inside, wo, jnp.zeros_like(wo))
  hidden = jnp.where(kept, hidden, 0.0)
  sum_ref[...] += _dot(hidden.astype(x_ref.dtype), wo)

  if 'wo_bias' in own:
    once = jnp.where(piece == 0, mine, 0.0)
    sum_ref[...] += once * own['wo_bias'][...].astype(jnp.float32)

  @pl.when((visit == pl.num_programs(0) - 1) & (piece == pl.num_programs(1) - 1))
  def _():
    y_ref[...] = sum_ref[...].astype(y_ref.dtype)


@functools.partial(jax.jit, static_argnames=('act', 'interpret'))
def neuron_select(
    x_md: jax.Array, experts: Mapping[str, Any], chosen_me: jax.Array,
    act: Callable[..., jax.Array], *, interpret: bool = False,
) -> jax.Array:
  """See `api.neuron_select`. Experts of less than 128 neurons are read as if they had as many."""
  (m, d), (e, _, f) = x_md.shape, experts['wi'].shape
  rows = -(-m // ROWS) * ROWS
  names = tuple(sorted(experts))
  matrices = 3 if 'gate' in experts else 2
  wide = width(d, f, matrices, experts['wi'].dtype.itemsize)
  visited_e = chosen_me.any(0)
  ids_e = jnp.argsort(~visited_e, stable=True).astype(jnp.int32)
  whole = lambda shape: pl.BlockSpec(shape, lambda v, p, ids: (0, 0))

  def given(name):
    return experts[name][:, None] if name.endswith('_bias') else experts[name]

  def spec(name):
    if name == 'wo':
      return pl.BlockSpec((None, wide, d), lambda v, p, ids: (ids[v], p, 0))
    if name == 'wo_bias':
      return pl.BlockSpec((None, 1, d), lambda v, p, ids: (ids[v], 0, 0))
    tall = 1 if name.endswith('_bias') else d
    return pl.BlockSpec((None, tall, wide), lambda v, p, ids: (ids[v], 0, p))

  y_md = pl.pallas_call(
      functools.partial(_kernel, names=names, act=act, neurons=f),
      out_shape=jax.ShapeDtypeStruct((rows, d), x_md.dtype),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1,
          # Where nothing was chosen one expert is read, for nobody.
          grid=(jnp.maximum(visited_e.sum(dtype=jnp.int32), 1), -(-f // wide)),
          in_specs=[whole((rows, d)), whole((rows, e)), *(spec(name) for name in names)],
          out_specs=whole((rows, d)),
          scratch_shapes=[pltpu.VMEM((rows, d), jnp.float32)],
      ),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('arbitrary', 'arbitrary'), vmem_limit_bytes=MOST_BYTES
      ),
      interpret=interpret,
      name='neuron_select',
  )(
      ids_e, jnp.pad(x_md, ((0, rows - m), (0, 0))),
      jnp.pad(chosen_me, ((0, rows - m), (0, 0))).astype(jnp.float32),
      *(given(name) for name in names),
  )
  return y_md[:m]
