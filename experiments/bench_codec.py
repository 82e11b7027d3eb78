"""Encode, decode and multiply: both ternary formats against dense, in weights a second."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing
from kernels_pallas.subbit_matmul import cases
from moejax import weights
from moejax.ops import compressed
from moejax.ops.expert_dot import expert_dot

_EXPERTS = 4
_FORMATS: dict[str, Any] = {'moejax': weights.Ternary, 'QMoE v1': weights.TernaryV1}


def _layer(case: cases.Case) -> tuple[np.ndarray, np.ndarray]:
  """Symbols [e, rows, cols] and levels [e, rows, 2] of a few experts of one shape."""
  rng = np.random.default_rng(0)
  p = [case.zero_share, (1 - case.zero_share) / 2, (1 - case.zero_share) / 2]
  symbols = rng.choice(3, size=(_EXPERTS, case.rows, case.cols), p=p).astype(np.uint8)
  size = 1 + rng.random((_EXPERTS, case.rows, 2))
  return symbols, (size * [-1, 1]).astype(np.float32)


def _row(case: cases.Case, what: str, implementation: str, fn, weights_done: int, repeats: int,
         **extra: Any) -> dict[str, Any]:
  times = timing.median_ms(fn, repeats=repeats, warmup=1)
  return {
      'bench': f'{what}, {case.rows}x{case.cols}, zeros {case.zero_share}',
      'implementation': implementation,
      **times, 'weights_per_second': weights_done / times['median_ms'] * 1e3, **extra,
  }


def run(timed: tuple[cases.Case, ...] = cases.TIMED[1:2], repeats: int = 5) -> list[dict[str, Any]]:
  """One row for each format and operation on each shape.

  Encoding and host decoding take a layer of four experts in NumPy on one core; decoding under jit
  and the products take one expert on JAX's default device.
  """
  rows = []
  for case in timed:
    symbols, levels = _layer(case)
    one = case.rows * case.cols
    x = jax.random.normal(jax.random.key(0), (64, case.cols))
    sizes = {m: jnp.zeros(_EXPERTS, jnp.int32).at[2].set(m) for m in (1, 64)}
    for name, node_class in _FORMATS.items():
      node = node_class.from_symbols(symbols, levels)
      extra = {'bits_per_weight': node.bits_per_weight()}
      rows.append(_row(
          case, 'encode on the host', name,
          lambda c=node_class: c.from_symbols(symbols, levels), symbols.size, repeats, **extra,
      ))
      rows.append(_row(case, 'decode on the host', name, node.symbols, symbols.size, repeats))
      node = jax.tree.map(jnp.asarray, node)
      decode = jax.jit(lambda n, i: n.expert_rows(i, jnp.float32))
      rows.append(_row(
          case, 'decode to float32 under jit', name,
          lambda f=decode, n=node: jax.block_until_ready(f(n, 1)), one, repeats,
      ))
      for m, group in sizes.items():
        if m == 1 and name == 'moejax':
          direct = jax.jit(lambda x, n: compressed.ternary_matvec(x, n, jnp.int32(2)))
          fn = lambda f=direct, n=node: jax.block_until_ready(f(x[0], n))
          rows.append(_row(case, '1 token, one expert', 'moejax, from the codes', fn, one, repeats))
          continue
        product = jax.jit(expert_dot)
        rows.append(_row(
            case, f'{m} token{"s" * (m > 1)}, one expert', f'{name}, expanded once',
            lambda f=product, n=node, m=m, g=group: jax.block_until_ready(f(x[:m], n, g)), one,
            repeats,
        ))
    for dtype in (jnp.float32, jnp.bfloat16):
      dense = node.dense(dtype)
      product = jax.jit(expert_dot)
      for m, group in sizes.items():
        rows.append(_row(
            case, f'{m} token{"s" * (m > 1)}, one expert', f'dense {jnp.dtype(dtype).name}',
            lambda f=product, w=dense, m=m, g=group: jax.block_until_ready(
                f(x[:m].astype(w.dtype), w, g)
            ), one, repeats,
        ))
  return rows
