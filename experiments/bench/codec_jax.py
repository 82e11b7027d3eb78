"""Worker: both ternary formats, encoded, decoded and multiplied, and dense weights beside them.

Encoding and host decoding take a layer of four experts in NumPy on one core; decoding under jit and
the products take one expert on the CPU. Speeds are in weights a second.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing
from kernels_pallas.codeword_matmul import cases
from moejax import weights
from moejax.ops.expert_dot import expert_dot

_EXPERTS, _EXPERT = 4, 2
_FORMATS: dict[str, Any] = {'moejax': weights.Ternary, 'QMoE v1': weights.TernaryV1}
_SMALL = cases.Case('small', 48, 96, 0.885)


def layer(case: cases.Case) -> tuple[np.ndarray, np.ndarray]:
  """Symbols [e, rows, cols] and levels [e, rows, 2] of a few experts of one shape."""
  rng = np.random.default_rng(0)
  p = [case.zero_share, (1 - case.zero_share) / 2, (1 - case.zero_share) / 2]
  symbols = rng.choice(3, size=(_EXPERTS, case.rows, case.cols), p=p).astype(np.uint8)
  size = 1 + rng.random((_EXPERTS, case.rows, 2))
  return symbols, (size * [-1, 1]).astype(np.float32)


def products(nodes: dict[str, Any], cols: int, tokens: int) -> dict[str, Any]:
  """name -> function () -> [tokens, rows] of one expert's product."""
  x = jax.random.normal(jax.random.key(0), (tokens, cols))
  sizes = jnp.zeros(_EXPERTS, jnp.int32).at[_EXPERT].set(tokens)
  operands = {name: (x, node) for name, node in nodes.items()}
  for dtype in ('float32', 'bfloat16'):
    operands[f'dense {dtype}'] = x.astype(dtype), nodes['moejax'].dense(dtype)
  dot = jax.jit(expert_dot)
  fns: dict[str, Any] = {n: (lambda x=x, w=w: dot(x, w, sizes)) for n, (x, w) in operands.items()}
  return {name: (lambda fn=fn: jax.block_until_ready(fn())) for name, fn in fns.items()}


def norms(calls: dict[str, Any]) -> dict[str, float]:
  return {name: float(jnp.linalg.norm(fn().astype(jnp.float32))) for name, fn in calls.items()}


def case_rows(case: cases.Case, repeats: int) -> list[dict[str, Any]]:
  symbols, levels = layer(case)
  one = case.rows * case.cols
  title = f'{case.rows}x{case.cols}, {case.zero_share:.1%} zeros'
  rows = []

  def add(metric, calls, count, work=None):
    for name, seconds in timing.measure(calls, repeats=repeats, warmup=1, budget_s=8.0).items():
      rows.append(timing.row(
          title, metric, name, [count / s for s in seconds], 'weights/s', ours=name == 'moejax',
          work=work and {'norm': work[name]},
      ))

  host = {name: cls.from_symbols(symbols, levels) for name, cls in _FORMATS.items()}
  for name, node in host.items():
    rows.append(timing.row(
        title, 'stored', name, [node.bits_per_weight()], 'bits a weight', ours=name == 'moejax'
    ))
  add('encode on the host', {
      n: (lambda c=c: c.from_symbols(symbols, levels)) for n, c in _FORMATS.items()
  }, symbols.size)
  add('decode on the host', {n: node.symbols for n, node in host.items()}, symbols.size)
  nodes = {n: jax.tree.map(jnp.asarray, node) for n, node in host.items()}
  decode = jax.jit(lambda node, i: node.expert_rows(i, jnp.float32))
  calls = {
      n: (lambda node=node: jax.block_until_ready(decode(node, _EXPERT)))
      for n, node in nodes.items()
  }
  add('decode to float32 under jit', calls, one, norms(calls))
  for tokens, metric in ((1, '1 token, from the codes'), (64, '64 tokens, one expert')):
    calls = products(nodes, case.cols, tokens)
    add(metric, calls, one, norms(calls))
  return rows


def main(quick: bool) -> list[dict[str, Any]]:
  if quick:
    return case_rows(_SMALL, repeats=1)
  return [row for case in cases.TIMED if case.rows < case.cols for row in case_rows(case, 5)]


if __name__ == '__main__':
  timing.run(main)
