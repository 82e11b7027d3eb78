"""The `moejax` ternary format: Tunstall codewords in blocks of rows, flat over a whole layer.

A matrix is `rows x cols` symbols (0 zero, 1 low, 2 high), a row being one output unit: the last
axis of a Flax kernel. Rows are cut into blocks of `block_rows`; a block's symbols run on over its
rows and are parsed into codewords of one `tunstall` table, the last one padded with zeros. One
offset a block gives random access. Tables are chosen for each matrix from its own statistics.

    words_w      uint16 [w]           codewords of all matrices, back to back
    offsets_eb   uint32 [e, blocks+1] first word of each block; the last entry ends the matrix
    design_e     uint8 [e]            `tunstall` table of each matrix

Host functions here are NumPy; `decode_jax` works under jit.
"""

import dataclasses
from typing import Any

import numpy as np

from moejax.codec import tunstall
from moejax.errors import UserError

BLOCK_WEIGHTS = 16384
_LANES = 4096
_TOGETHER = 1 << 25
_FAR = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
  """A layer of encoded matrices; see the module for shapes."""

  words_w: np.ndarray
  offsets_eb: np.ndarray
  design_e: np.ndarray
  block_rows: int
  shape: tuple[int, int, int]

  @property
  def bits(self) -> int:
    """Stored bits: codewords, offsets and table ids."""
    return 16 * self.words_w.size + 32 * self.offsets_eb.size + 8 * self.design_e.size


def default_block_rows(rows: int, cols: int) -> int:
  """Rows of a block: the power of two that first holds BLOCK_WEIGHTS weights, at most `rows`."""
  block = 1
  while block * cols < BLOCK_WEIGHTS and block < rows:
    block *= 2
  return min(block, rows)


def block_sizes(rows: int, cols: int, block_rows: int) -> np.ndarray:
  """Weights of each block of a matrix, int64 [blocks]; only the last may be shorter."""
  blocks = -(-rows // block_rows)
  sizes = np.full(blocks, block_rows * cols, np.int64)
  sizes[-1] = (rows - (blocks - 1) * block_rows) * cols
  return sizes


def encode(
    symbols_erc: np.ndarray, *, block_rows: int | None = None, designs: np.ndarray | None = None
) -> Encoded:
  """Encodes symbols {0, 1, 2} of shape [e, rows, cols]; any sizes of 1 and more.

  Args:
    symbols_erc: integer array.
    block_rows: rows that share one offset; None for `default_block_rows`.
    designs: `tunstall` design id of each matrix; None for `choose_designs`.

  Raises:
    UserError: a symbol outside {0, 1, 2}, or an empty axis.
  """
  symbols_erc = np.asarray(symbols_erc)
  if symbols_erc.ndim != 3 or 0 in symbols_erc.shape:
    raise UserError(f'symbols have shape {symbols_erc.shape}; [experts, rows, cols] is needed')
  if symbols_erc.min() < 0 or symbols_erc.max() > 2:
    raise UserError(
        f'ternary symbols are 0, 1 and 2, these span {symbols_erc.min()}..{symbols_erc.max()}'
    )
  e, rows, cols = symbols_erc.shape
  block_rows = min(block_rows or default_block_rows(rows, cols), rows)
  if block_rows * cols > _FAR // 2:
    raise UserError(f'a block of {block_rows} rows x {cols} is over {_FAR // 2} weights')
  if designs is None:
    designs = choose_designs(symbols_erc)
  designs = np.asarray(designs, np.uint8)
  words: list[Any] = [None] * e
  counts = np.zeros((e, -(-rows // block_rows)), np.int64)
  together = max(1, _TOGETHER // (rows * cols))
  for design in np.unique(designs):
    (same,) = np.nonzero(designs == design)
    for i in range(0, len(same), together):
      part = same[i : i + together]
      sizes = np.tile(block_sizes(rows, cols, block_rows), len(part))
      codes, count = _encode_flat(symbols_erc[part].reshape(-1), sizes, int(design))
      counts[part] = count.reshape(len(part), -1)
      ends = np.cumsum(counts[part].sum(1))
      for expert, chunk in zip(part, np.split(codes, ends[:-1])):
        words[expert] = chunk
  if counts.sum() >= 2**32:
    raise UserError(f'{counts.sum()} codewords do not fit 32-bit offsets; encode fewer experts')
  ends = np.cumsum(counts.reshape(-1)).reshape(counts.shape)
  offsets = np.concatenate([ends[:, :1] - counts[:, :1], ends], axis=1)
  return Encoded(
      words_w=np.concatenate(words), offsets_eb=offsets.astype(np.uint32), design_e=designs,
      block_rows=block_rows, shape=(e, rows, cols),
  )


def expected_words(zero_share: float, rows: int, cols: int) -> float:
  """Codewords of a rows x cols matrix of independent symbols, from the tables alone.

  The matrix over the mean codeword length, and half a codeword lost at the end of each block. Zeros
  that cluster cost less, matrices of uneven rows a little more.
  """
  length = max(tunstall.mean_length(d, zero_share) for d in tunstall.designs_near(zero_share))
  return rows * cols / length + 0.5 * -(-rows // default_block_rows(rows, cols))


def choose_designs(symbols_erc: np.ndarray) -> np.ndarray:
  """The design that codes each matrix smallest, uint8 [e].

  The three best by the zero share, assuming independent symbols, are tried on up to 128 pieces
  of 512 weights spread over the matrix.
  """
  e = symbols_erc.shape[0]
  flat = symbols_erc.reshape(e, -1)
  piece = min(512, flat.shape[1])
  starts = np.unique(np.linspace(0, flat.shape[1] - piece, 128).astype(np.int64))
  sample = flat[:, starts[:, None] + np.arange(piece)]
  sizes = np.full(e * len(starts), piece, np.int64)
  near = np.stack([tunstall.designs_near(float(np.mean(m == 0))) for m in flat])
  used = np.full((e, len(tunstall.DESIGNS)), np.iinfo(np.int64).max)
  for design in np.unique(near):
    (tried,) = np.nonzero((near == design).any(1))
    own = sizes[: len(tried) * len(starts)]
    _, counts = _encode_flat(sample[tried].reshape(-1), own, int(design))
    used[tried, design] = counts.reshape(len(tried), -1).sum(1)
  # Ties go to the design nearest by zero share.
  tries = np.take_along_axis(used, near, axis=1)
  return np.take_along_axis(near, tries.argmin(1)[:, None], axis=1)[:, 0].astype(np.uint8)


def _encode_flat(
    flat: np.ndarray, sizes: np.ndarray, design: int
) -> tuple[np.ndarray, np.ndarray]:
  """Codewords of consecutive blocks, uint16, and the count of each, int64."""
  ends = np.cumsum(sizes)
  places = np.flatnonzero(flat)
  firsts = np.searchsorted(places, np.append(0, ends))
  parts = []
  for i in range(0, len(sizes), _LANES):
    own = slice(firsts[i], firsts[min(i + _LANES, len(sizes))])
    lane_ends = ends[i : i + _LANES]
    runs, signs, heads = _runs(
        places[own], flat[places[own]], lane_ends - sizes[i : i + _LANES], lane_ends
    )
    parts.append(_encode_lanes(runs, signs, heads, tunstall.table(design)))
  return (
      np.concatenate([codes for codes, _ in parts]).astype(np.uint16),
      np.concatenate([counts for _, counts in parts]),
  )


def _runs(places, symbols, starts, ends):
  """Runs of zeros before each nonzero and, _FAR longer, before the end of each lane.

  Returns run lengths and signs (1: high) of all lanes back to back, and each lane's first.
  """
  per_lane = np.diff(np.searchsorted(places, np.append(starts, ends[-1])))
  tails = np.cumsum(per_lane)
  stops = np.insert(places, tails, ends)
  signs = np.insert(symbols == 2, tails, False).astype(np.int32)
  heads = tails - per_lane + np.arange(len(starts))
  before = np.append(0, stops[:-1] + 1)
  before[heads] = starts
  runs = stops - before
  runs[tails + np.arange(len(starts))] += _FAR
  return runs.astype(np.int32), signs, heads


def _encode_lanes(runs, signs, heads, table):
  """Parses lanes side by side: each step takes a run of zeros, or as much as ends a codeword."""
  steps = np.concatenate([table.child_ns.reshape(-1), -1 - table.chain_code_n])
  live, at, node = np.arange(len(heads)), heads, np.zeros(len(heads), np.int32)
  run, sign = runs[at], signs[at]
  taken: list[np.ndarray] = []
  lanes, codes = [], []
  while live.size:
    chain = table.chain_n.take(node)
    hit = run < chain
    child = steps.take(np.where(hit, 2 * (node + run) + sign, table.child_ns.size + node))
    taken.append(child)
    at = at + hit
    run = np.where(hit, runs.take(at), run - chain)
    sign = signs.take(at)
    node = np.maximum(child, 0)
    # A lane ends with the codeword that reaches or passes the end of its last run.
    done = (child < 0) & (run <= _FAR) & (run > _FAR // 2)
    if done.any():
      parsed = np.stack(taken, axis=1)
      lane, step = np.nonzero(parsed < 0)
      lanes.append(live[lane])
      codes.append(-1 - parsed[lane, step])
      taken.clear()
      live, at, node, run, sign = (a[~done] for a in (live, at, node, run, sign))
  lane = np.concatenate(lanes)
  order = np.argsort(lane, kind='stable')
  return np.concatenate(codes)[order], np.bincount(lane, minlength=len(heads))


def decode(encoded: Encoded) -> np.ndarray:
  """The symbols again, uint8 [e, rows, cols].

  Raises:
    UserError: the codes do not fill the blocks exactly.
  """
  e, rows, cols = encoded.shape
  out = np.empty((e, rows, cols), np.uint8)
  for i in range(e):
    out[i] = decode_rows(encoded, i, 0, rows)
  return out


def decode_rows(encoded: Encoded, expert: int, first_row: int, last_row: int) -> np.ndarray:
  """Rows first_row..last_row-1 of one matrix, reading only the blocks that hold them."""
  _, rows, cols = encoded.shape
  if not 0 <= first_row < last_row <= rows:
    raise UserError(f'rows {first_row}..{last_row} of a matrix of {rows} rows')
  step = encoded.block_rows
  first, last = first_row // step, -(-last_row // step)
  sizes = block_sizes(rows, cols, step)[first:last]
  offsets = encoded.offsets_eb[expert, first : last + 1].astype(np.int64)
  words = encoded.words_w[offsets[0] : offsets[-1]]
  table = tunstall.table(int(encoded.design_e[expert]))
  flat = decode_blocks(words, np.diff(offsets), sizes, table)
  rows_out = flat.reshape(-1, cols)
  return rows_out[first_row - first * step : last_row - first * step]


def decode_blocks(
    words: np.ndarray, counts: np.ndarray, sizes: np.ndarray, table: tunstall.Table
) -> np.ndarray:
  """Symbols of consecutive blocks, flat uint8, from their codewords and codeword counts."""
  check_blocks(words, counts, sizes, table)
  length = table.length_u[words].astype(np.int64)
  end = np.cumsum(length)
  firsts = np.concatenate([[0], np.cumsum(counts)])[:-1]
  bases = np.concatenate([[0], np.cumsum(sizes)])[:-1]
  shift = bases - (end - length)[firsts]
  start = end - length + np.repeat(shift, counts)
  out = np.zeros(int(sizes.sum()), np.uint8)
  for slot in range(table.nonzeros_uk.shape[1]):
    entry = table.nonzeros_uk[words, slot]
    use = entry != tunstall.DROPPED
    out[start[use] + (entry[use] >> 1)] = 1 + (entry[use] & 1)
  return out


def check_blocks(
    words: np.ndarray, counts: np.ndarray, sizes: np.ndarray, table: tunstall.Table,
    name: str = 'matrix',
) -> None:
  """Raises UserError unless each block's codewords fill it, the last one reaching its end."""
  if counts.size == 0 or counts.min() < 1 or counts.sum() != words.size:
    raise UserError(
        f'{name}: {words.size} codewords for blocks of {counts.tolist()[:4]} ...; codes are '
        'truncated or offsets damaged; restore the file'
    )
  if int(words.max()) >= tunstall.CODEWORDS:
    raise UserError(f'{name}: codeword {int(words.max())} is in no table; restore the file')
  length = table.length_u[words].astype(np.int64)
  firsts = np.concatenate([[0], np.cumsum(counts)])[:-1]
  covered = np.add.reduceat(length, firsts)
  last = length[np.cumsum(counts) - 1]
  bad = np.flatnonzero((covered < sizes) | (covered - last >= sizes))
  if bad.size:
    raise UserError(
        f'{name}, block {bad[0]}: codewords stand for {covered[bad[0]]} weights, the block has '
        f'{sizes[bad[0]]}; codes and offsets do not belong together; restore the file'
    )
