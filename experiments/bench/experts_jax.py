"""Worker: the expert loop against a dense [experts, tokens] expansion and `ragged_dot`, CPU."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import timing
from moejax.ops import expert_dot as expert_dot_lib


def main() -> None:
  rows = []
  d, f = 768, 3072
  for experts, tokens in ((8, 1024), (64, 1024), (64, 16), (64, 1)):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, d))
    w = jax.random.normal(keys[1], (experts, d, f))
    owner = jnp.sort(jax.random.randint(keys[2], (tokens,), 0, experts))
    sizes = jnp.zeros(experts, jnp.int32).at[owner].add(1)
    forms: dict[str, Any] = {
        'expert loop (ours)': expert_dot_lib.expert_dot,
        'lax.ragged_dot': jax.lax.ragged_dot,
        'one dense product of the same size': lambda x, w, sizes: x @ w[0],
    }
    for name, form in forms.items():
      compiled = jax.jit(form).lower(x, w, sizes).compile()
      fn = lambda: jax.block_until_ready(compiled(x, w, sizes))
      rows.append({
          'bench': f'{tokens} tokens, {experts} experts {d}x{f}', 'implementation': name,
          'temp_bytes': compiled.memory_analysis().temp_size_in_bytes,
          **timing.median_ms(fn, repeats=5, warmup=1),
      })
  timing.emit(rows)


if __name__ == '__main__':
  main()
