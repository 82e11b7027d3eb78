"""Decoding the `moejax` ternary format under jit, on any backend: one matrix at a time.

A codeword is a length and a few (position, sign) nonzeros, so the work is a prefix sum of lengths
and one scatter of the nonzeros into zeros: it follows the codewords, not the weights.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.codec import tunstall

_CHUNK = 64


class DecodeTable(NamedTuple):
  """A `tunstall.Table` packed for gathers, with an empty entry for the unused codeword.

  length_u int32 [65536]; fields_ju uint32 [j, 65536], each holding 32 // bits fields
  (position << 1 | is high) from the low end, all ones where there is no nonzero.
  """

  length_u: np.ndarray
  fields_ju: np.ndarray
  bits: int


@functools.cache
def decode_table(design: int) -> DecodeTable:
  """The packed table of a design id: 8-bit fields where lengths allow, else 16-bit ones."""
  table = tunstall.table(design)
  bits = 8 if table.max_length <= 127 else 16
  none = (1 << bits) - 1
  spare = 2**tunstall.CODEWORD_BITS - tunstall.CODEWORDS
  nonzeros = table.nonzeros_uk.astype(np.uint32)
  nonzeros[nonzeros == tunstall.DROPPED] = none
  per_word = 32 // bits
  missing = -nonzeros.shape[1] % per_word
  nonzeros = np.pad(nonzeros, ((0, spare), (0, missing)), constant_values=none)
  shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
  fields = (nonzeros.reshape(len(nonzeros), -1, per_word) << shifts).sum(-1, dtype=np.uint32)
  length = np.pad(table.length_u, (0, spare))
  return DecodeTable(length, np.ascontiguousarray(fields.T), bits)


@functools.cache
def entries(designs: tuple[int, ...]) -> np.ndarray:
  """Of each design the length and nonzeros of its codewords, uint16 [designs, 65536, k].

  A nonzero is position << 1 | is high; all ones past a codeword's last.
  """
  tables = [tunstall.table(design) for design in designs]
  most = max(table.nonzeros_uk.shape[1] for table in tables)
  made = np.full((len(designs), 2**tunstall.CODEWORD_BITS, 1 + most), tunstall.DROPPED, np.uint16)
  made[:, :, 0] = 0
  for own, table in zip(made, tables):
    codewords, kept = table.nonzeros_uk.shape
    own[:codewords, 0], own[:codewords, 1 : 1 + kept] = table.length_u, table.nonzeros_uk
  return made


def exclusive_sums(x_w: jax.Array) -> jax.Array:
  """Sums of all entries before each, int32 [w]; entries are codeword lengths, at most 4095.

  Two levels of matmuls with a triangle, exact in float32 (64 * 64 * 4095 < 2^24), and one of plain
  sums: faster to run, and far faster to compile on CPU, than a cumulative sum.
  """
  n = x_w.shape[0]
  chunks = jnp.pad(x_w, (0, -n % _CHUNK**2)).reshape(-1, _CHUNK, _CHUNK).astype(jnp.float32)
  before = jnp.asarray(np.triu(np.ones((_CHUNK, _CHUNK), np.float32), 1))
  exact = jax.lax.Precision.HIGHEST
  inside = jnp.einsum('abc,cd->abd', chunks, before, precision=exact)
  chunk_total = chunks.sum(axis=2)
  chunk_start = jnp.einsum('ab,bd->ad', chunk_total, before, precision=exact)
  total = chunk_total.sum(axis=1).astype(jnp.int32)
  k = total.shape[0]
  start = jnp.where(np.tril(np.ones((k, k), bool), -1), total[None, :], 0).sum(axis=1)
  near = (inside + chunk_start[:, :, None]).astype(jnp.int32)
  return (near + start[:, None, None]).reshape(-1)[:n]


@functools.partial(
    jax.jit, static_argnames=('designs', 'rows', 'cols', 'block_rows', 'max_words')
)
def decode_matrix(
    words_sw: jax.Array, shard: jax.Array, offsets_b: jax.Array, design_index: jax.Array,
    *, designs: tuple[int, ...], rows: int, cols: int, block_rows: int, max_words: int,
) -> jax.Array:
  """Ternary values {-1, 0, 1} of one matrix, int8 [rows, cols].

  Args:
    words_sw: uint16 [shards, w] codewords.
    shard: traced index of the row of words_sw that holds the matrix.
    offsets_b: uint32 [blocks + 1], first word of each block, and the end.
    design_index: traced position of the matrix's table in `designs`.
    designs: table ids in use, static.
    rows, cols, block_rows: static sizes.
    max_words: static bound on the codewords of a matrix, at most w.
  """
  decode = functools.partial(
      _decode, rows=rows, cols=cols, block_rows=block_rows, max_words=max_words
  )
  branches = [functools.partial(decode, design=d) for d in designs]
  args = (words_sw, shard, offsets_b)
  if len(branches) == 1:
    return branches[0](*args)
  return jax.lax.switch(design_index.astype(jnp.int32), branches, *args)


def _decode(words_sw, shard, offsets_b, *, design, rows, cols, block_rows, max_words):
  table = decode_table(design)
  words, own, offsets_b = window(words_sw, shard, offsets_b, max_words)
  length = jnp.where(own, jnp.asarray(table.length_u)[words], 0)
  blocks = -(-rows // block_rows)
  sizes = np.full(blocks, block_rows * cols, np.int32)
  sizes[-1] = (rows - (blocks - 1) * block_rows) * cols
  start = starts(length, offsets_b, jnp.asarray(sizes))
  none = (1 << table.bits) - 1
  fields = []
  for fields_u in table.fields_ju:
    packed = jnp.asarray(fields_u)[words]
    fields += [((packed >> s) & none).astype(jnp.int32) for s in range(0, 32, table.bits)]
  return place(start, fields, own, none, (rows, cols))


def window(
    words_sw: jax.Array, shard: jax.Array | int, offsets_b: jax.Array, max_words: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The static window of max_words codewords that holds one matrix.

  Returns int32 codewords [max_words], which of them are the matrix's own, and offsets into them.
  """
  offsets_b = offsets_b.astype(jnp.int32)
  first = jnp.minimum(offsets_b[0], words_sw.shape[1] - max_words)
  corner = (jnp.asarray(shard, jnp.int32), first)
  words = jax.lax.dynamic_slice(words_sw, corner, (1, max_words))[0].astype(jnp.int32)
  offsets_b = offsets_b - first
  index = jnp.arange(max_words)
  return words, (index >= offsets_b[0]) & (index < offsets_b[-1]), offsets_b


def starts(length_w: jax.Array, offsets_b: jax.Array, sizes_b: jax.Array) -> jax.Array:
  """Where each codeword begins in the matrix, int32 [w].

  Blocks are `sizes_b` weights long. A block's last codeword may run past its end: what it
  overshoots is taken from its length.
  """
  last = offsets_b[1:] - 1
  ends = (exclusive_sums(length_w) + length_w)[last]
  over = ends - jnp.append(0, ends[:-1]) - sizes_b
  return exclusive_sums(length_w.at[last].add(-over))


def place(
    start_w: jax.Array, fields_k: list[jax.Array], own_w: jax.Array, none: int,
    shape: tuple[int, int],
) -> jax.Array:
  """Scatters codewords' nonzeros, fields (position << 1 | is high) or `none`, into int8 zeros."""
  size = shape[0] * shape[1]
  places = [jnp.where(own_w & (f != none), start_w + (f >> 1), size) for f in fields_k]
  values = [(2 * (f & 1) - 1).astype(jnp.int8) for f in fields_k]
  flat = jnp.zeros(size, jnp.int8).at[jnp.concatenate(places)].set(
      jnp.concatenate(values), mode='drop', unique_indices=True
  )
  return flat.reshape(shape)


def apply_levels(ternary_rc: jax.Array, levels_r2: jax.Array) -> jax.Array:
  """low where -1, high where 1, else 0: [rows, cols] in the levels' dtype."""
  low, high = levels_r2[:, :1], levels_r2[:, 1:]
  zero = jnp.zeros((), levels_r2.dtype)
  return jnp.where(ternary_rc > 0, high, jnp.where(ternary_rc < 0, low, zero))
