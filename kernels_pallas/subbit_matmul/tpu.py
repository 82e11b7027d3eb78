"""The product on TPU (Mosaic): a tile's columns are decoded beside the matrix unit, four at a time.

A grid step takes four tiles of 128 outputs of one strip of one expert, whose rows it finds through
the expert's record. For each step of eight words, lanes find their bits in windows of a few
registers by gathers over sublanes; the words go to the matrix unit as in `ternary_matmul.tpu`. When
all of an expert's outputs are summed, they are moved to where they belong.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata
import jax.numpy as jnp
import numpy as np

from kernels_pallas.subbit_matmul import layout
from kernels_pallas.subbit_matmul.layout import block
from kernels_pallas.ternary_matmul import layout as two_bit
from kernels_pallas.ternary_matmul import tpu as ternary

ROWS = ternary.ROWS
MOST_ROWS = 256
TOGETHER = 4  # Tiles of a grid step.
LANES, SUBLANES = layout.LANES, layout.SUBLANES
_MOST_VMEM = 64 << 20
_MOST_RECORD = 1 << 16  # Words of scalar memory.


def supports(m: int, e: int, sizes: layout.Sizes, dtype: Any) -> str:
  """Why the kernel does not take a product; '' if it does."""
  refused = ternary.supports(m, sizes.d, sizes.f, e, dtype)
  if refused:
    return refused
  if sizes.record > _MOST_RECORD:
    return (
        f'{sizes.patches} patches, {sizes.tiles} tiles: a record of {sizes.record} words, at most '
        f'{_MOST_RECORD}'
    )
  needed = _vmem(m, sizes, dtype)
  if needed > _MOST_VMEM:
    return f'it needs {needed >> 20} MiB of vector memory, at most {_MOST_VMEM >> 20}'
  return ''


def _tall(m: int, dtype: Any) -> tuple[int, int]:
  """Rows of a tile of x, and bfloat16 parts of each."""
  return min(MOST_ROWS, -(-m // ROWS) * ROWS), 3 if jnp.dtype(dtype) == jnp.float32 else 1


def _vmem(m: int, sizes: layout.Sizes, dtype: Any) -> int:
  rows, parts = _tall(m, dtype)
  columns, wide = sizes.tiles * LANES, min(TOGETHER, sizes.tiles) * LANES
  blocks = (
      4 * sizes.registers * SUBLANES * LANES + 2 * parts * rows * sizes.inputs
      + jnp.dtype(dtype).itemsize * rows * columns + 16 * columns
  )
  scratch = (4 * rows + 32) * columns + 8 * parts * rows * wide + sizes.inputs * wide // 4
  return 2 * blocks + scratch


def _sublane() -> jax.Array:
  return jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)


def _gather(a: jax.Array, index: jax.Array, axis: int = 0) -> jax.Array:
  return jnp.take_along_axis(a, index, axis=axis, mode='promise_in_bounds')


def _before(a: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Sums of the sublanes above each, and of all, in every sublane."""
  sublane, sums = _sublane(), a
  for n in (1, 2, 4):
    sums = sums + jnp.where(sublane >= n, _gather(sums, (sublane - n) & 7), 0)
  return sums - a, _gather(sums, jnp.full_like(a, SUBLANES - 1))


def _row(rows_ref: Any, first: jax.Array, count: int, row: jax.Array) -> jax.Array:
  """Each lane's word of a row, counted from register `first`, of `count` registers."""
  sublane = row & 7
  out = _gather(rows_ref[first], sublane)
  for j in range(1, count):
    out = jnp.where(row >= SUBLANES * j, _gather(rows_ref[first + j], sublane), out)
  return out


def _bits(words: Any, at: jax.Array) -> jax.Array:
  """The 32 bits from bit `at` of a stream: words(offset) is the word that many after its first."""
  shift, word = at & 31, block.shr(at, 5)
  return block.shr(words(word), shift) | block.shl(block.shl(words(word + 1), 1), 31 - shift)


def _bits_back(words: Any, at: jax.Array) -> jax.Array:
  """The same, each word's highest bit first."""
  shift, word = at & 31, block.shr(at, 5)
  return block.shl(words(word), shift) | block.shr(block.shr(words(word + 1), 1), 31 - shift)


def _pairs(form: layout.Form) -> np.ndarray | None:
  """int32 [8, 128]: `block.pair` by its field, entries marked by the sign; None where too many."""
  count = 1 << 2 * form.place + 1
  if count > LANES:
    return None
  with jax.ensure_compile_time_eval():
    bits, entry = block.pair(jnp.arange(LANES, dtype=jnp.int32) % count, form)
    table = jnp.where(entry, bits | jnp.int32(-(1 << 31)), bits)
  return np.broadcast_to(np.asarray(table), (SUBLANES, LANES))


class _Tile(NamedTuple):
  """A tile of the grid step: its lanes there, where its record starts, its first and last row."""

  lanes: slice
  record: jax.Array
  first: jax.Array
  last: jax.Array


def _decode(
    kinds: jax.Array, q: jax.Array, j: int, starts: Any, tile: _Tile, sizes: layout.Sizes,
    record_ref: Any, rows_ref: Any, table: jax.Array | None,
) -> tuple[list[jax.Array], Any]:
  """Two-bit words, int32 [8, 128] each, of the j-th step of a group."""
  form, windows = sizes.form, sizes.windows
  firsts = record_ref[0, tile.record + 1 + q * form.together + j]

  def fields_at(at):
    register = (tile.first + (firsts & 0xFFFF)) >> 3
    ahead = tile.first + SUBLANES * sizes.tail.group - register * SUBLANES
    return _bits(lambda word: _row(rows_ref, register, windows[0], word + ahead), at)

  def entries_at(at):
    register = (tile.first + block.shr(firsts, 16)) >> 3
    ahead = tile.last - register * SUBLANES
    return _bits_back(lambda word: _row(rows_ref, register, windows[1], ahead - word), at)

  def pair_of(field):
    if table is None:
      return block.pair(field, form)
    return _gather(table, field & layout.mask(2 * form.place + 1), axis=1), None

  return block.decode_step(
      kinds, j, starts, form, before=_before, fields_at=fields_at, entries_at=entries_at,
      pair_of=pair_of,
  )


def _tile(
    place: int, tile: jax.Array, ahead: jax.Array, record_ref: Any, sizes: layout.Sizes
) -> _Tile:
  """A tile of the strip, in a place of the grid step; its strip starts `ahead` rows on."""
  at = tile * sizes.header
  first, after = record_ref[0, at], record_ref[0, at + sizes.header]
  lanes = slice(place * LANES, (place + 1) * LANES)
  return _Tile(lanes, at, first + ahead, after + ahead - 1)


def _tail_classes(tile: _Tile, sizes: layout.Sizes, rows_ref: Any) -> jax.Array:
  """Words of classes of a tile's tail."""
  tail, at = sizes.tail, tile.first + SUBLANES * sizes.tail.group
  ahead = at & 7
  bits = _bits(
      lambda word: _row(rows_ref, at >> 3, 2, word + ahead), tail.at(_sublane(), jnp)
  )
  return block.tail_classes(bits, _sublane(), sizes.form, tail)


def _patch(patched_ref: Any, tile: _Tile, record_ref: Any, sizes: layout.Sizes) -> None:
  """Writes a tile's patches over zeros, some at a time, of which the last may be of no bits."""
  flat = _sublane() * LANES + jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
  some, listed = layout.PATCHES_AT_ONCE, sizes.tiles * sizes.header + 1
  begin, end = (record_ref[0, tile.record + sizes.header - i] for i in (2, 1))

  def write(i, carry):
    for k in range(some):
      at = listed + 2 * (begin + i * some + k)
      place, bits = record_ref[0, at], record_ref[0, at + 1]
      register = place >> 10
      here = jnp.where(flat == place & (SUBLANES * LANES - 1), bits, 0)
      patched_ref[register, :, tile.lanes] = patched_ref[register, :, tile.lanes] | here
    return carry

  jax.lax.fori_loop(0, jax.lax.div(end - begin, some), write, 0)


def _multiply(x_ref: Any, chunk: jax.Array, words: jax.Array, sum_refs: Any) -> None:
  """Adds x by the weights of a chunk's words to the sums by weights and by magnitudes."""
  x = x_ref[:, pl.ds(pl.multiple_of(chunk * two_bit.CHUNK, two_bit.CHUNK), two_bit.CHUNK)]
  for sum_ref, mask in zip(sum_refs, (two_bit.BOTH, two_bit.EXPONENTS)):
    sum_ref[...] += jnp.dot(x, ternary.weights(words, mask), preferred_element_type=jnp.float32)


def _move_home(z_ref: Any, homes_ref: Any, spread_ref: Any, y_ref: Any, own: jax.Array) -> None:
  """Writes the sums of each lane of each tile where they belong, of own rows."""
  tiles, rows = homes_ref.shape[0], y_ref.shape[0]
  homes = homes_ref[...].astype(jnp.int32)
  for g in range(tiles):
    spread_ref[g] = jnp.broadcast_to(homes[g : g + 1], (SUBLANES, LANES))

  def one(g, carry):
    home = spread_ref[g]
    tile, lane = block.shr(home, 7), home & (LANES - 1)
    lanes = pl.ds(pl.multiple_of(g * LANES, LANES), LANES)
    made = []
    for r in range(0, rows, SUBLANES):
      out = z_ref[r : r + SUBLANES, :LANES]
      for k in range(1, tiles):
        out = jnp.where(tile == k, z_ref[r : r + SUBLANES, k * LANES : (k + 1) * LANES], out)
      made.append(_gather(out, lane, axis=1))
    new = jnp.concatenate(made)
    y_ref[:, lanes] = jnp.where(own, new, y_ref[:, lanes].astype(jnp.float32)).astype(y_ref.dtype)
    return carry

  jax.lax.fori_loop(0, tiles, one, 0)


def _kernel(
    offsets_ref, groups_ref, tiles_ref, starts_ref, x_ref, rows_ref, record_ref, levels_ref,
    homes_ref, *refs, sizes: layout.Sizes, parts: int, total: int, has_table: bool,
):
  table: Any = None
  if has_table:
    table, refs = refs[0][...], refs[1:]
  y_ref, z_ref, patched_ref, spread_ref, *sum_refs = refs
  visit, strip, n = (pl.program_id(i) for i in range(3))
  together = min(TOGETHER, sizes.tiles)
  first_tile = jnp.minimum(n * together, sizes.tiles - together)
  start = starts_ref[groups_ref[visit] * sizes.strips + strip]
  # Rows of the strip before its first are seen where it does not start with a register.
  ahead = start - _first_register(start, total, sizes) * SUBLANES
  own_tiles = [_tile(g, first_tile + g, ahead, record_ref, sizes) for g in range(together)]

  if sizes.patches:
    @pl.when((visit == 0) & (strip == 0) & (n == 0))
    def _():
      patched_ref[...] = jnp.zeros_like(patched_ref)

    for tile in own_tiles:
      _patch(patched_ref, tile, record_ref, sizes)

  for sum_ref in sum_refs:
    sum_ref[...] = jnp.zeros_like(sum_ref)
  registers = sizes.form.together * sizes.form.words

  tail = sizes.tail
  tails = [_tail_classes(tile, sizes, rows_ref) for tile in own_tiles] if tail.steps else []

  def group(q, starts):
    starts = list(starts)
    kinds = []
    for tile in own_tiles:
      at = tile.first + SUBLANES * q
      kinds.append(_row(rows_ref, at >> 3, 2, _sublane() + (at & 7)))
    if tail.steps:
      kinds = [jnp.where(q == tail.group, t, k) for t, k in zip(tails, kinds)]
    whole, done = [], 0
    for j in range(sizes.form.together):
      made = []
      for g, tile in enumerate(own_tiles):
        words, starts[g] = _decode(
            kinds[g], q, j, starts[g], tile, sizes, record_ref, rows_ref, table
        )
        made.append(words)
      whole += [jnp.concatenate(parts, axis=1) for parts in zip(*made)]
      while len(whole) >= 2:
        chunk = q * (registers // 2) + done
        for i in range(2 if sizes.patches else 0):
          whole[i] |= patched_ref[2 * chunk + i]
          patched_ref[2 * chunk + i] = jnp.zeros_like(whole[i])
        _multiply(x_ref, chunk, jnp.concatenate(whole[:2]), sum_refs)
        whole, done = whole[2:], done + 1
    return tuple(starts)

  zeros = jnp.zeros((SUBLANES, LANES), jnp.int32)
  jax.lax.fori_loop(0, sizes.groups, group, ((zeros + tail.end, zeros),) * together)
  columns = pl.ds(pl.multiple_of(first_tile * LANES, LANES), together * LANES)
  y = ternary.with_levels(
      [sum_ref[...] for sum_ref in sum_refs], levels_ref[:, columns].astype(jnp.float32), parts
  )
  rows = y_ref.shape[0]
  # The last tiles were seen before where they do not fill a grid step.
  lane = jax.lax.broadcasted_iota(jnp.int32, y.shape, 1)
  new = lane >= (n * together - first_tile) * LANES
  z_ref[:, columns] = jnp.where(
      strip == 0, y, z_ref[:, columns] + jnp.where(new, y, 0.0)
  )

  @pl.when((strip == sizes.strips - 1) & (n == pl.num_programs(2) - 1))
  def _():
    own = ternary.own_rows(offsets_ref, groups_ref, tiles_ref, (rows, LANES), visit=visit)
    _move_home(z_ref, homes_ref, spread_ref, y_ref, own)


def _first_register(start: Any, total: int, sizes: layout.Sizes) -> Any:
  """The first register of rows that the grid steps of a strip see."""
  return jnp.minimum(start >> 3, total - sizes.registers)


def _call(
    scalars: tuple[jax.Array, ...], visits: jax.Array, x_md: jax.Array, registers: jax.Array,
    records_es1w: jax.Array, levels_enc: jax.Array, homes_etl: jax.Array, sizes: layout.Sizes,
    rows: int, interpret: bool,
) -> jax.Array:
  """The kernel on padded arrays: [rows of x, columns]."""
  strips, tiles, columns = sizes.strips, sizes.tiles, sizes.tiles * LANES
  levels, total = levels_enc.shape[1], registers.shape[0]
  x_parts, parts = ternary.bfloat16_parts(x_md, rows)
  tall = parts * rows
  together = min(TOGETHER, tiles)
  table = _pairs(sizes.form)
  of_expert = lambda *rest: lambda v, k, n, o, groups, t, s: (groups[v], *rest)
  in_specs = [
      pl.BlockSpec((tall, sizes.inputs), lambda v, k, n, o, g, row_tiles, s: (row_tiles[v], k)),
      pl.BlockSpec(
          (pl.Element(sizes.registers), pl.Element(SUBLANES), pl.Element(LANES)),
          lambda v, k, n, o, groups, t, starts: (
              _first_register(starts[groups[v] * strips + k], total, sizes), 0, 0
          ),
      ),
      pl.BlockSpec(
          (None, None, 1, records_es1w.shape[3]),
          lambda v, k, n, o, groups, t, s: (groups[v], k, 0, 0),
          memory_space=pltpu.SMEM,
      ),
      pl.BlockSpec((None, levels, columns), of_expert(0, 0)),
      pl.BlockSpec((None, tiles, LANES), of_expert(0, 0)),
  ]
  arguments = [x_parts, registers, records_es1w, levels_enc, homes_etl]
  if table is not None:
    in_specs.append(pl.BlockSpec((SUBLANES, LANES), lambda *_: (0, 0)))
    arguments.append(jnp.asarray(table))
  return pl.pallas_call(
      functools.partial(
          _kernel, sizes=sizes, parts=parts, total=total, has_table=table is not None
      ),
      out_shape=jax.ShapeDtypeStruct((x_md.shape[0], columns), x_md.dtype),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=4,
          grid=(visits, strips, -(-tiles // together)),
          in_specs=in_specs,
          out_specs=pl.BlockSpec(
              (rows, columns), lambda v, k, n, o, groups, row_tiles, s: (row_tiles[v], 0)
          ),
          scratch_shapes=[
              pltpu.VMEM((rows, columns), jnp.float32),
              pltpu.VMEM(
                  (sizes.inputs // 128 if sizes.patches else 1, SUBLANES, together * LANES),
                  jnp.int32,
              ),
              pltpu.VMEM((tiles, SUBLANES, LANES), jnp.int32),
          ] + [pltpu.VMEM((tall, together * LANES), jnp.float32)] * levels,
      ),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('arbitrary',) * 3, vmem_limit_bytes=_MOST_VMEM + (16 << 20)
      ),
      interpret=interpret,
      name='subbit_matmul',
  )(*scalars, *arguments)


@functools.partial(jax.jit, static_argnames=('sizes', 'interpret'))
def subbit_matmul(
    x_md: jax.Array, rows_rl: jax.Array, starts_es: jax.Array, records_es1w: jax.Array,
    levels_enc: jax.Array, homes_etl: jax.Array, group_sizes_e: jax.Array, *,
    sizes: layout.Sizes, interpret: bool = False,
) -> jax.Array:
  """See `api.subbit_matmul`."""
  m = x_md.shape[0]
  e = levels_enc.shape[0]
  rows, _ = _tall(m, x_md.dtype)
  total_m = -(-m // rows) * rows
  strips = sizes.strips
  # Each strip's inputs, and zeros to the end of its last group of steps.
  depth = layout.depth_of(sizes.d)
  x_md = layout.in_code(jnp.pad(x_md, ((0, total_m - m), (0, 0))), 1, jnp)
  x_md = jnp.pad(
      x_md.reshape(total_m, strips, depth), ((0, 0), (0, 0), (0, sizes.inputs - depth))
  ).reshape(total_m, -1)
  rows_rl = jax.lax.bitcast_convert_type(rows_rl, jnp.int32)
  short = max(0, sizes.registers * SUBLANES - rows_rl.shape[0])
  rows_rl = jnp.pad(rows_rl, ((0, short + -(rows_rl.shape[0] + short) % SUBLANES), (0, 0)))
  registers = rows_rl.reshape(-1, SUBLANES, LANES)
  group_sizes = group_sizes_e.astype(jnp.int32)
  (offsets, groups, row_tiles), visits = make_group_metadata(
      group_sizes=group_sizes, m=total_m, tm=rows, start_group=jnp.int32(0), num_nonzero_groups=e,
      visit_empty_groups=False,
  )
  made = _call(
      (offsets, groups, row_tiles, starts_es.reshape(-1)), visits, x_md, registers, records_es1w,
      levels_enc, homes_etl, sizes, rows, interpret,
  )
  inside = (jnp.arange(m) < group_sizes.sum())[:, None]
  return jnp.where(inside, made[:m, : sizes.f], jnp.zeros((), made.dtype))
