"""The product on TPU (Mosaic): symbols are masked into bfloat16 numbers beside the matrix unit.

A field of b bits is shifted to the top of a bfloat16's mantissa, under an exponent that makes it
2^b + symbol: three operations for a register of two weights, and no conversion. Each field of a
width is a product of its own. What all weights have too much, and the zeros, is taken off with the
rows' sums at the end. float32 rows are three bfloat16 rows, as in `ternary_matmul.tpu`.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata
import jax.numpy as jnp

from kernels_pallas.packed_matmul import layout
from kernels_pallas.ternary_matmul import tpu as ternary

ROWS = ternary.ROWS
MOST_ROWS = 128
DEPTH = 256  # Inputs of a product.
SUBLANES, LANES = 8, 128
UNROLLED = 8  # Products of a loop's round.
WIDE = 512  # Outputs a tile.
MOST_BYTES = 48 << 20


class Field(NamedTuple):
  """How the words of one field are taken, in chunks of whole registers.

  `begin`: the first chunk's first word; `ahead`: words before the field's first, which meet zeros.
  `shift`: the field's place in a symbol. `parts`: groups of inputs that a chunk reaches into.
  """

  bits: int
  shift: int
  begin: int
  ahead: int
  words: int
  chunks: int
  parts: int

  @property
  def per_word(self) -> int:
    return 32 // self.bits

  @property
  def depth(self) -> int:
    """Inputs of a chunk."""
    return self.words * self.per_word

  @property
  def inputs(self) -> int:
    """Inputs of all chunks, zeros at either end among them."""
    return self.chunks * self.depth


def fields(d: int, bits: int, group_size: int) -> tuple[Field, ...]:
  """The fields of a width, lowest bits first."""
  made, begin, shift = [], 0, 0
  for field in layout.FIELDS[bits]:
    least = SUBLANES * 32 // field
    depth = DEPTH
    if group_size and group_size < DEPTH:
      depth = max(group_size, least, LANES)
    words = depth * field // 32
    count, ahead = -(-d * field // 32), begin % SUBLANES
    parts = depth // group_size if 0 < group_size < depth else 1
    made.append(
        Field(field, shift, begin - ahead, ahead, words, -(-(ahead + count) // words), parts)
    )
    begin, shift = begin + count, shift + field
  return tuple(made)


def _words(own: tuple[Field, ...]) -> int:
  """Words of an output that a tile holds, past the last field's end too."""
  return max(field.begin + field.chunks * field.words for field in own)


def supports(
    m: int, d: int, f: int, e: int, dtype: Any, bits: int, group_size: int = 0
) -> str:
  """Why the kernel does not take a product; '' if it does."""
  refused = ternary.supports(m, d, f, e, dtype)
  if refused:
    return refused
  if group_size and DEPTH % group_size and group_size % DEPTH:
    return f'groups of {group_size} inputs neither divide {DEPTH} nor are a multiple of it'
  own = fields(d, bits, group_size)
  if group_size and any(field.ahead for field in own):
    return f'groups of inputs, and {d} inputs of {bits} bits have a field inside a register'
  tall = min(MOST_ROWS, -(-m // ROWS) * ROWS) * (3 if jnp.dtype(dtype) == jnp.float32 else 1)
  wide = min(f, WIDE)
  groups = layout.groups(d, group_size)
  needed = (
      8 * _words(own) * wide + 4 * tall * sum(field.inputs for field in own)
      + 16 * groups * wide + 16 * tall * wide + 8 * MOST_ROWS * (groups + 128)
  )
  if needed > MOST_BYTES:
    return f'{needed >> 20} MiB of vector memory are needed, more than {MOST_BYTES >> 20}'
  return ''


def weights(words: jax.Array, bits: int) -> jax.Array:
  """A chunk's words [w, n] as bfloat16 [w 32 / bits, n]: 2^bits + symbol, in `ordered`'s order."""
  words = jax.lax.bitcast_convert_type(words, jnp.uint32)
  place = 7 - bits
  mask, base = (jnp.uint32(half * 0x1_0001) for half in (((1 << bits) - 1) << place,
                                                         (127 + bits) << 7))
  pairs = []
  for step in range(16 // bits):
    left = place - bits * step
    moved = words << jnp.uint32(left) if left >= 0 else words >> jnp.uint32(-left)
    pairs.append(pltpu.bitcast((moved & mask) | base, jnp.bfloat16))
  return jnp.concatenate(pairs)


def ordered(x_md: jax.Array, field: Field) -> jax.Array:
  """Rows whose inputs lie as `weights` has them, [m, field.inputs], zeros beyond both ends.

  A word's lower half holds its inputs 0, 1, ..., its upper half the others; a chunk has the first
  of every half first.
  """
  m, d = x_md.shape
  front = field.ahead * field.per_word
  x_md = jnp.pad(x_md, ((0, 0), (front, field.inputs - front - d)))
  x_mcwhs = x_md.reshape(m, field.chunks, field.words, 2, field.per_word // 2)
  return x_mcwhs.transpose(0, 1, 4, 2, 3).reshape(m, field.inputs)


def together(field: Field) -> int:
  """Chunks of a loop's round."""
  return max(n for n in range(1, UNROLLED + 1) if field.chunks % n == 0)


def _of_part(part: int, field: Field, group_size: int) -> jax.Array:
  """Which inputs of a chunk, in `ordered`'s order, are of one of its groups, [1, depth]."""
  at = jax.lax.broadcasted_iota(jnp.int32, (1, field.depth), 1)
  step, word = jax.lax.div(at, 2 * field.words), jax.lax.div(jax.lax.rem(at, 2 * field.words), 2)
  inputs = word * field.per_word + jax.lax.rem(at, 2) * (field.per_word // 2) + step
  return jax.lax.div(inputs, group_size) == part


def _add_field(x_ref, words_ref, factors_ref, sum_ref, field: Field, first: int, group_size: int):
  """Adds x by a field's weights, times the scales where there are groups; x from input `first`."""
  factor = float(1 << field.shift)

  def chunk(c):
    begin = pl.multiple_of(field.begin + c * field.words, SUBLANES)
    w = weights(words_ref[pl.ds(begin, field.words), :], field.bits)
    at = first + c * field.depth
    x = x_ref[:, pl.ds(pl.multiple_of(at, LANES), field.depth)]
    for part in range(field.parts):
      own = x
      if field.parts > 1:
        own = jnp.where(_of_part(part, field, group_size), x, jnp.zeros((), x.dtype))
      made = jnp.dot(own, w, preferred_element_type=jnp.float32)
      if group_size:
        group = jax.lax.div(jnp.int32(c * field.depth), group_size) + part
        group = jnp.minimum(group, factors_ref.shape[0] - 1)
        made *= factor * factors_ref[pl.ds(group, 1), :]
      elif field.shift:
        made *= factor
      sum_ref[...] += made

  several = together(field)

  def round_of_them(i, _):
    for j in range(several):
      chunk(i * several + j)
    return 0

  if field.chunks == several:
    round_of_them(0, 0)
  else:
    jax.lax.fori_loop(0, field.chunks // several, round_of_them, 0)


def _kernel(
    offsets_ref, groups_ref, tiles_ref, x_ref, total_ref, words_ref, scale_ref, zero_ref, y_ref,
    sum_ref, factors_ref, *, parts: int, own: tuple[Field, ...], group_size: int,
):
  sum_ref[...] = jnp.zeros_like(sum_ref)
  factors_ref[...] = scale_ref[...].astype(jnp.float32)
  first = 0
  for field in own:
    _add_field(x_ref, words_ref, factors_ref, sum_ref, field, first, group_size)
    first += field.inputs
  rows = y_ref.shape[0]
  y = sum_ref[0:rows, :]
  for part in range(1, parts):
    y += sum_ref[part * rows : (part + 1) * rows, :]
  more = zero_ref[...].astype(jnp.float32) + sum(1 << (f.shift + f.bits) for f in own)
  if group_size:
    y -= jnp.dot(
        total_ref[...], factors_ref[...] * more, preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
    )
  else:
    y = factors_ref[...] * (y - more * total_ref[...])
  mine = ternary.own_rows(
      offsets_ref, groups_ref, tiles_ref, y.shape, visit=pl.program_id(1)
  )
  y_ref[...] = jnp.where(mine, y, y_ref[...].astype(jnp.float32)).astype(y_ref.dtype)


def _totals(x_md: jax.Array, group_size: int) -> jax.Array:
  """Sums of each row's groups of inputs, float32 [m, groups]."""
  m, d = x_md.shape
  size = group_size or d
  x_mgs = jnp.pad(x_md, ((0, 0), (0, -d % size))).reshape(m, -1, size)
  return x_mgs.astype(jnp.float32).sum(-1)


@functools.partial(jax.jit, static_argnames=('bits', 'group_size', 'interpret'))
def packed_matmul(
    x_md: jax.Array, words_ewf: jax.Array, scale_efg: jax.Array, zero_efg: jax.Array,
    group_sizes_e: jax.Array, *, bits: int, group_size: int = 0, interpret: bool = False,
) -> jax.Array:
  """See `api.packed_matmul`."""
  (m, d), (e, _, f), levels = x_md.shape, words_ewf.shape, scale_efg.shape[2]
  own = fields(d, bits, group_size)
  rows = min(MOST_ROWS, -(-m // ROWS) * ROWS)
  total_m = -(-m // rows) * rows
  x_md = jnp.pad(x_md, ((0, total_m - m), (0, 0)))
  sizes = group_sizes_e.astype(jnp.int32)
  (offsets, of_visit, tiles), visits = make_group_metadata(
      group_sizes=sizes, m=total_m, tm=rows, start_group=jnp.int32(0), num_nonzero_groups=e,
      visit_empty_groups=False,
  )
  x_parts, parts = ternary.bfloat16_parts(x_md, rows)
  x_parts = jnp.concatenate([ordered(x_parts, field) for field in own], axis=1)
  tall, wide = parts * rows, min(f, WIDE)
  level = pl.BlockSpec(
      (None, levels, wide), lambda n, v, offsets, groups, tiles: (groups[v], 0, n)
  )
  y_mf = pl.pallas_call(
      functools.partial(_kernel, parts=parts, own=own, group_size=group_size),
      out_shape=jax.ShapeDtypeStruct((total_m, f), x_md.dtype),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=3,
          grid=(-(-f // wide), visits),
          in_specs=[
              pl.BlockSpec(
                  (tall, x_parts.shape[1]), lambda n, v, offsets, groups, tiles: (tiles[v], 0)
              ),
              pl.BlockSpec((rows, levels), lambda n, v, offsets, groups, tiles: (tiles[v], 0)),
              pl.BlockSpec(
                  (None, _words(own), wide),
                  lambda n, v, offsets, groups, tiles: (groups[v], 0, n),
              ),
              level, level,
          ],
          out_specs=pl.BlockSpec(
              (rows, wide), lambda n, v, offsets, groups, tiles: (tiles[v], n)
          ),
          scratch_shapes=[pltpu.VMEM((n, wide), jnp.float32) for n in (tall, levels)],
      ),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=MOST_BYTES
      ),
      interpret=interpret,
      name='packed_matmul',
  )(
      offsets, of_visit, tiles, x_parts, _totals(x_md, group_size), words_ewf,
      scale_efg.swapaxes(1, 2), zero_efg.swapaxes(1, 2),
  )
  inside = (jnp.arange(m) < sizes.sum())[:, None]
  return jnp.where(inside, y_mf[:m], jnp.zeros((), y_mf.dtype))
