"""Worker: grouped products with compressed experts on an NVIDIA card, against bfloat16 by XLA.

The experts of a case are at least 500 MB in bfloat16, more than a card's caches hold; those of
'again' are one, read again and again. Each program is LAYERS products, of which each waits for the
one before. Kernels by Mosaic GPU are timed beside XLA where they take the shape.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import os
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import kernels_jax, timing
from kernels_pallas.subbit_matmul.layout import decode
from moejax import weights
from moejax.ops.expert_dot import expert_dot

# d, f, and how many rows each expert has: GRIN's experts, then the six shapes of QMoE.
SHAPES = (
    (4096, 6400, (1, 4, 16, 64, 512)), (6400, 4096, (1,)), (768, 3072, (1, 16)),
    (3072, 768, (1,)), (1024, 4096, (1, 16)), (4096, 1024, (1,)), (2080, 6144, (1, 16)),
    (6144, 2080, (1,)),
)
SMALL = ((64, 128, (1, 3)),)
STREAMED = 500e6  # Bytes of the experts in bfloat16.
LAYERS = 4
MEMORY = {'H100': 3.35e12, 'H200': 4.8e12}  # Bytes a second.
WRONG = 0.02  # Of the norm; bfloat16 rounds to a 256th.
PEER = 'bfloat16, XLA'
MOSAIC = {PEER: 'bfloat16, Mosaic', 'two bits, two levels': 'two bits, two levels, Mosaic',
          'two bits, one level': 'two bits, one level, Mosaic', '4 bits': '4 bits, Mosaic'}


def nodes(d: int, f: int) -> dict[str, Any]:
  """One expert [1, d, f] by the name of its format."""
  rng = np.random.default_rng(0)
  share = kernels_jax.ZERO_SHARE
  symbols = rng.choice(3, p=[share, *[(1 - share) / 2] * 2], size=(1, f, d)).astype(np.uint8)
  levels = np.abs(rng.standard_normal((1, f, 2))) * [-1, 1]
  signs = np.array([0, -1, 1], np.int8)[symbols].swapaxes(1, 2)
  one = levels[:, None, :, 1].astype(jnp.bfloat16)
  two = weights.PackedTernary.from_symbols(symbols, levels)
  return {
      'two bits, two levels': two,
      'two bits, one level': dataclasses.replace(two, levels=one),
      'below one bit': weights.BlockTernary.from_signs(signs, two.levels),
      '4 bits': weights.Packed.from_symbols(
          rng.integers(0, 16, (1, f, d)), levels[..., 1], np.full((1, f), 2.0), bits=4
      ),
  }


def copies(node: Any, e: int) -> Any:
  """The expert e times, each in memory of its own."""
  if not isinstance(node, weights.BlockTernary):
    return node.take([0] * e)
  each = lambda a: np.tile(a, (e, *[1] * (np.ndim(a) - 1)))
  firsts = node.words.shape[1] * np.arange(e, dtype=np.int32)
  return dataclasses.replace(
      node, words=np.tile(node.words, (1, e, 1)), starts=each(node.starts) + firsts[:, None],
      records=each(node.records), levels=each(node.levels), homes=each(node.homes),
  )


def chained(product: Callable[..., jax.Array]) -> Any:
  """(x, w, sizes) to the first of LAYERS products, jitted."""

  def run(x_md, w, sizes_e):
    first_mf = y_mf = product(x_md, w, sizes_e)
    for _ in range(LAYERS - 1):
      x_md = x_md + (1e-30 * y_mf.sum()).astype(x_md.dtype)
      y_mf = product(x_md, w, sizes_e)
    return first_mf, y_mf[:1, :1]

  return jax.jit(run)


def timed(run: Callable[..., Any], *args: Any) -> Any:
  """What it gives, once that is there."""
  return jax.block_until_ready(run(*args))


def asked(for_mosaic: bool) -> contextlib.AbstractContextManager[Any]:
  """MOEJAX_GPU while a program is traced."""
  return mock.patch.dict(os.environ, {'MOEJAX_GPU': 'mosaic' if for_mosaic else 'xla'})


def right(y_mf: jax.Array, x_md: jax.Array, w_df: np.ndarray, name: str) -> float:
  """The error's share of the norm, against float64.

  Raises:
    ValueError: it is more than rounding.
  """
  want_mf = np.asarray(x_md, np.float64) @ np.asarray(w_df, np.float64)
  error = float(np.linalg.norm(np.asarray(y_mf, np.float64) - want_mf) / np.linalg.norm(want_mf))
  if not error < WRONG:
    raise ValueError(f'{name}: off by {error:.1%} of the product in float64')
  return error


def expanded(node: weights.BlockTernary) -> jax.Array:
  """The words at two bits of all experts, in the order of the columns kept."""
  words_rl = node.words.reshape(-1, node.words.shape[-1])
  return jax.lax.map(
      lambda e: decode.kept_words(words_rl, node.starts, node.records, e, node.sizes),
      jnp.arange(len(node.starts)),
  )


def measured(
    made: dict[str, Any], d: int, f: int, e: int, rows: int, how: str
) -> Iterator[dict[str, Any]]:
  """Rows of every format with `rows` rows for each of e experts."""
  case = f'{d} -> {f}, {e} expert{"s" if e > 1 else ""}'
  x = jax.random.normal(jax.random.key(0), (e * rows, d), jnp.bfloat16)
  sizes = jnp.full(e, rows, jnp.int32)
  plain = made['two bits, two levels'].dense(jnp.bfloat16)
  held = {PEER: jnp.tile(plain, (e, 1, 1))}
  held |= {name: jax.tree.map(jnp.asarray, copies(node, e)) for name, node in made.items()}
  calls: dict[str, Callable[[], Any]] = {}
  errors: dict[str, float] = {}
  for name, w in held.items():
    one = np.asarray(made[name].dense(jnp.bfloat16)[0] if name in made else plain[0])
    for mosaic in (False, True) if name in MOSAIC else (False,):
      with asked(mosaic):
        label = MOSAIC[name] if mosaic else name
        lowered = chained(expert_dot).lower(x, w, sizes)
        if mosaic and 'mosaic_gpu' not in lowered.as_text():
          continue  # XLA serves.
        run = lowered.compile()
        calls[label] = functools.partial(timed, run, x, w, sizes)
        y = calls[label]()[0]
        errors[label] = right(y[-rows:], x[-rows:], one, f'{case}, {how}: {label}')
  codes = held['below one bit']
  expand = jax.jit(expanded).lower(codes).compile()
  calls['below one bit, expanded to two'] = functools.partial(timed, expand, codes)
  samples = timing.measure(calls, repeats=15, budget_s=4.0)
  rate = next((r for n, r in MEMORY.items() if n in jax.devices()[0].device_kind), None)
  for name, taken in samples.items():
    once = [s / (LAYERS if name in errors else 1) for s in taken]
    w = held.get(name, held[next((n for n, m in MOSAIC.items() if m == name), 'below one bit')])
    read = sum(a.nbytes for a in jax.tree.leaves(w)) + 2 * e * rows * (d + f)
    yield timing.row(
        case, f'{how}: {name}', 'moejax', once, ours=True, error=errors.get(name), bytes=read
    )
    if name != PEER:
      peer = [s / LAYERS for s in samples[PEER]]
      yield timing.row(case, f'{how}: {name}', PEER, peer, ours=False)
    gbs = [read / s / 1e9 for s in once]
    yield timing.row(case, f'{how}: {name}, read', 'moejax', gbs, 'GB/s', ours=True)
    if rate:
      share = [100 * 1e9 * g / rate for g in gbs]
      yield timing.row(
          case, f"{how}: {name}, of the memory's rate", 'moejax', share, '%', ours=True
      )


def main(quick: bool) -> list[dict[str, Any]]:
  out: list[dict[str, Any]] = []
  for d, f, tokens in SMALL if quick else SHAPES:
    made = nodes(d, f)
    experts = 2 if quick else -(-int(STREAMED) // (2 * d * f))
    for e, rows in ((1, 1), *((experts, rows) for rows in tokens)):
      how = 'again' if e == 1 else f'{rows} row{"s" if rows > 1 else ""} each'
      out += measured(made, d, f, e, rows, how)
  return out


if __name__ == '__main__':
  timing.run(main)
