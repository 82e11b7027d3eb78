"""Worker: grouped products with compressed experts on an NVIDIA card, against bfloat16 by XLA.

Every expert has as many rows, so that the peer is one batched product. The experts of a case take
at least 2 GB in bfloat16, so that those below one bit a weight do not fit the card's caches either;
'again' is one expert, read again and again. A program is LAYERS products, of which each waits for
the one before. Kernels by Mosaic GPU are timed beside XLA where they take the shape. What fails is
said and left out, and so is what would begin after DEADLINE_S.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import os
import sys
import time
from typing import Any, NamedTuple
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
    (4096, 6400, (1, 4, 16, 64)), (6400, 4096, (1,)), (768, 3072, (1,)), (3072, 768, (1,)),
    (1024, 4096, (1,)), (4096, 1024, (1,)), (2080, 6144, (1,)), (6144, 2080, (1,)),
)
SMALL = ((64, 128, (1, 3)),)
STREAMED = 2e9  # Bytes of the experts in bfloat16.
LAYERS = 32
DEADLINE_S = 400
MEMORY = {'H100': 3.35e12, 'H200': 4.8e12}  # Bytes a second.
WRONG = 0.02  # Of the norm; bfloat16 rounds to a 256th.
PEER = 'bfloat16, one batched product by XLA'
PLAIN, EXPANDED = 'bfloat16, XLA', 'below one bit, expanded to two'
MOSAIC = {name: f'{name.removesuffix(", XLA")}, Mosaic' for name in (
    PLAIN, 'two bits, two levels', 'two bits, one level', '4 bits',
)}


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


def factors(e: int) -> np.ndarray:
  """What each is of the first, so that another one's product is wrong; bfloat16 [e, 1, 1]."""
  return np.exp2(np.arange(e) % 3).astype(jnp.bfloat16)[:, None, None]


def copies(node: Any, e: int) -> Any:
  """The expert times `factors`, each in memory of its own."""
  each = lambda a: np.tile(a, (e, *[1] * (np.ndim(a) - 1)))
  if isinstance(node, weights.Packed):
    return dataclasses.replace(node.take([0] * e), scale=each(node.scale) * factors(e))
  levels = each(node.levels) * factors(e)
  if not isinstance(node, weights.BlockTernary):
    return dataclasses.replace(node.take([0] * e), levels=levels)
  firsts = node.words.shape[1] * np.arange(e, dtype=np.int32)
  return dataclasses.replace(
      node, words=np.tile(node.words, (1, e, 1)), starts=each(node.starts) + firsts[:, None],
      records=each(node.records), levels=levels, homes=each(node.homes),
  )


def chained(product: Callable[..., jax.Array]) -> Any:
  """(x, w, sizes) to the first of LAYERS products and a piece of the last, jitted."""

  def run(x_md, w, sizes_e):
    def after(_, x_md):
      y_mf = product(x_md, w, sizes_e)
      return x_md + (1e-30 * y_mf.sum()).astype(x_md.dtype)

    return product(x_md, w, sizes_e), jax.lax.fori_loop(0, LAYERS - 1, after, x_md)[:1, :1]

  return jax.jit(run)


def batched(x_md: jax.Array, w_edf: jax.Array, sizes_e: jax.Array) -> jax.Array:
  """The product of experts with as many rows each."""
  x_erd = x_md.reshape(len(sizes_e), -1, x_md.shape[1])
  y_erf = jnp.einsum('erd,edf->erf', x_erd, w_edf, preferred_element_type=jnp.float32)
  return y_erf.astype(x_md.dtype).reshape(len(x_md), -1)


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


class Measured(NamedTuple):
  """A call, bytes it moves, its products and the error of the first."""

  call: Callable[[], Any]
  moved: int
  products: int
  error: float | None


def call_of(
    name: str, w: Any, x: jax.Array, sizes: jax.Array, one_df: np.ndarray, mosaic: bool
) -> Measured | None:
  """The chained products of a format; None where Mosaic does not take them.

  Raises:
    ValueError: a product is wrong.
  """
  with asked(mosaic):
    lowered = chained(batched if name == PEER else expert_dot).lower(x, w, sizes)
  if mosaic and 'mosaic_gpu' not in lowered.as_text():
    return None
  call = functools.partial(timed, lowered.compile(), x, w, sizes)
  y = call()[0]
  rows = len(x) // len(sizes)
  last = float(factors(len(sizes))[-1, 0, 0])
  error = max(right(y[:rows], x[:rows], one_df, name),
              right(y[-rows:], x[-rows:], one_df * last, name))
  moved = sum(a.nbytes for a in jax.tree.leaves((w, x, y)))
  return Measured(call, moved, LAYERS, error)


def calls_of(made: dict[str, Any], d: int, e: int, rows: int, case: str) -> dict[str, Measured]:
  """Every format's; what fails is said and left out."""
  x = jax.random.normal(jax.random.key(0), (e * rows, d), jnp.bfloat16)
  sizes = jnp.full(e, rows, jnp.int32)
  plain = made['two bits, two levels'].dense(jnp.bfloat16)
  held: dict[str, Any] = dict.fromkeys((PEER, PLAIN), jnp.tile(plain, (e, 1, 1)) * factors(e))
  held |= {name: jax.tree.map(jnp.asarray, copies(node, e)) for name, node in made.items()}
  found: dict[str, Measured] = {}
  for name, w in held.items():
    one = np.asarray(made[name].dense(jnp.bfloat16)[0] if name in made else plain[0], np.float64)
    for mosaic in (False, True) if name in MOSAIC else (False,):
      label = MOSAIC[name] if mosaic else name
      try:
        call = call_of(name, w, x, sizes, one, mosaic)
      except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        print(f'{case}: {label} is left out: {str(error)[:300]}', file=sys.stderr)
      else:
        found |= {label: call} if call else {}
  codes = held['below one bit']
  expand = jax.jit(expanded).lower(codes).compile()
  words = expand(codes)
  moved = words.nbytes + sum(a.nbytes for a in jax.tree.leaves(codes))
  found[EXPANDED] = Measured(functools.partial(timed, expand, codes), moved, 1, None)
  return found


def rows_of(case: str, how: str, found: dict[str, Measured]) -> Iterator[dict[str, Any]]:
  """The rows of `calls_of`, timed in turn."""
  samples = timing.measure({n: m.call for n, m in found.items()}, repeats=9, budget_s=2.0)
  rate = next((r for n, r in MEMORY.items() if n in jax.devices()[0].device_kind), None)
  each = {name: [s / found[name].products for s in taken] for name, taken in samples.items()}
  for name, once in each.items():
    notes: dict[str, Any] = {'error': found[name].error, 'bytes': found[name].moved}
    if name != PEER:
      yield timing.row(case, f'{how}: {name}', 'moejax', once, ours=True, **notes)
      if PEER in each and name != EXPANDED:
        yield timing.row(case, f'{how}: {name}', PEER, each[PEER], ours=False)
    gbs = [found[name].moved / s / 1e9 for s in once]
    yield timing.row(case, f'{how}: {name}, moved', 'moejax', gbs, 'GB/s', ours=True)
    if rate:
      share = [1e11 * g / rate for g in gbs]
      what = f"{how}: {name}, of the memory's rate"
      yield timing.row(case, what, 'moejax', share, '%', ours=True)


def main(quick: bool) -> list[dict[str, Any]]:
  out: list[dict[str, Any]] = []
  begin = time.monotonic()
  for i, (d, f, tokens) in enumerate(SMALL if quick else SHAPES):
    made = nodes(d, f)
    experts = 2 if quick else -(-int(STREAMED) // (2 * d * f))
    cases = [(experts, r, f'{r} row{"s" if r > 1 else ""} each') for r in tokens]
    for e, rows, how in (*cases, *([] if i else [(1, 1, 'again')])):
      case = f'{d} -> {f}, {e} expert{"s" if e > 1 else ""}'
      if time.monotonic() - begin > DEADLINE_S:
        print(f'{case}, {how}: left out, {DEADLINE_S} s are over', file=sys.stderr)
        continue
      out += rows_of(case, how, calls_of(made, d, e, rows, f'{case}, {how}'))
  return out


if __name__ == '__main__':
  timing.run(main)
