"""Worker: products with one compressed expert against the same expert in float32, on CPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing
from moejax import weights
from moejax.ops.expert_dot import expert_dot

SHAPES = ((768, 3072), (3072, 768))  # d, f
SMALL = ((24, 40),)
TOKENS = (1, 4, 16, 64)
LAYERS = 8  # In one program, so that nothing stays in the cache from call to call.
ZERO_SHARE = 0.885


def nodes(d: int, f: int, rng: np.random.Generator) -> dict[str, Any]:
  """One expert [1, d, f] by the name of its format."""
  symbols = rng.choice(3, p=[ZERO_SHARE, *[(1 - ZERO_SHARE) / 2] * 2], size=(1, f, d))
  levels = np.abs(rng.standard_normal((1, f, 2))) * [-1, 1]
  one = levels[..., 1:] * [-1, 1]
  made: dict[str, Any] = {
      'ternary, two bits, two levels': weights.PackedTernary.from_symbols(symbols, levels),
      'ternary, two bits, one level': weights.PackedTernary.from_symbols(symbols, one),
      'ternary, below one bit': weights.Ternary.from_symbols(symbols, levels),
      'ternary, below one bit, for a kernel': weights.BlockTernary.from_symbols(symbols, levels),
  }
  for bits in (2, 3, 4):
    made[f'{bits}-bit with scale and zero'] = weights.Packed.from_symbols(
        rng.integers(0, 1 << bits, (1, f, d)), levels[..., 1], np.full((1, f), 2.0), bits=bits
    )
  return made


def chain(product: Any) -> Any:
  """jit(x, layers) of LAYERS products, each of which waits for the one before."""

  def run(x_md, layers):
    outputs = []
    for layer in layers:
      y_mf = product(x_md, layer)
      outputs.append(y_mf[:, :1])
      x_md = x_md + 1e-30 * y_mf.sum()
    return outputs

  return jax.jit(run)


def shape_rows(d: int, f: int) -> list[dict[str, Any]]:
  rng = np.random.default_rng(0)
  copies = lambda node: [jax.tree.map(jnp.array, node) for _ in range(LAYERS)]
  experts = {name: copies(node) for name, node in nodes(d, f, rng).items()}
  rows = []
  for m in TOKENS:
    x = jnp.asarray(rng.standard_normal((m, d), np.float32))
    sizes = jnp.array([m], jnp.int32)
    compressed, plain = chain(lambda x, w: expert_dot(x, w, sizes)), chain(jnp.dot)
    calls, work = {}, {}
    for name, layers in experts.items():
      arrays = copies(layers[0].dense(jnp.float32)[0])
      for side, run, held in ((name, compressed, layers), (f'{name}, dense', plain, arrays)):
        calls[side] = lambda run=run, held=held: jax.block_until_ready(run(x, held))
        work[side] = {'output_norm': float(jnp.linalg.norm(jnp.stack(calls[side]())))}
    samples = timing.measure(calls, repeats=15, warmup=1, budget_s=8.0)
    case = f'{d} -> {f}, {m} token{"s" if m > 1 else ""}'
    for name in experts:
      for side, who in ((name, 'moejax'), (f'{name}, dense', 'float32 matrix, XLA')):
        each = [s / LAYERS for s in samples[side]]
        rows.append(timing.row(case, name, who, each, ours=who == 'moejax', work=work[side]))
  return rows


def main(quick: bool) -> list[dict[str, Any]]:
  return [row for shape in (SMALL if quick else SHAPES) for row in shape_rows(*shape)]


if __name__ == '__main__':
  timing.run(main)
