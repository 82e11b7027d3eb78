"""Worker: the expert FFN against a dense [experts, tokens] expansion and `ragged_dot`, on CPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing
from moejax.ops import ffn

# (experts, tokens, experts that have tokens)
CASES = ((8, 1024, 8), (64, 1024, 64), (128, 1024, 128), (128, 64, 4))
SMALL = ((4, 32, 4), (8, 8, 2))


def expansion(params: dict[str, jax.Array], x_md: jax.Array, sizes_e: jax.Array) -> jax.Array:
  """Every expert gets a row for every token, zero where the token is not its own."""
  experts, tokens = sizes_e.shape[0], x_md.shape[0]
  owner_m = jnp.repeat(jnp.arange(experts), sizes_e, total_repeat_length=tokens)
  own_em1 = (jnp.arange(experts)[:, None] == owner_m[None])[..., None]
  x_emd = jnp.where(own_em1, x_md[None], 0.0)
  hidden = jax.nn.relu(jnp.einsum('emd,edf->emf', x_emd, params['wi']))
  return jnp.einsum('emf,efd->emd', hidden, params['wo']).sum(0)


def ragged(params: dict[str, jax.Array], x_md: jax.Array, sizes_e: jax.Array) -> jax.Array:
  hidden = jax.nn.relu(jax.lax.ragged_dot(x_md, params['wi'], sizes_e))
  return jax.lax.ragged_dot(hidden, params['wo'], sizes_e)


def ours(params: dict[str, jax.Array], x_md: jax.Array, sizes_e: jax.Array) -> jax.Array:
  return ffn.expert_ffn(params, x_md, sizes_e, 'relu')


FORMS = {'moejax': ours, 'dense expansion': expansion, 'lax.ragged_dot': ragged}


def case_rows(experts: int, tokens: int, active: int, d: int, f: int) -> list[dict[str, Any]]:
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
  x = draw(tokens, d)
  params = {'wi': draw(experts, d, f) * d**-0.5, 'wo': draw(experts, f, d) * f**-0.5}
  owner = rng.integers(0, active, tokens) * (experts // active)
  sizes = jnp.asarray(np.bincount(owner, minlength=experts), jnp.int32)
  compiled = {n: jax.jit(f).lower(params, x, sizes).compile() for n, f in FORMS.items()}
  calls = {
      n: (lambda c=c: jax.block_until_ready(c(params, x, sizes))) for n, c in compiled.items()
  }
  work = {n: {'output_norm': float(jnp.linalg.norm(call()))} for n, call in calls.items()}
  samples = timing.measure(calls, repeats=5, warmup=0, budget_s=6.0)  # `work` was the warm-up
  case = f'{experts} experts, {tokens} tokens on {active} of them'
  rows = []
  for name, c in compiled.items():
    common: dict[str, Any] = dict(ours=name == 'moejax', work=work[name])
    rows.append(timing.row(case, 'time', name, samples[name], **common))
    megabytes = c.memory_analysis().temp_size_in_bytes / 1e6
    rows.append(timing.row(case, 'memory beside weights and tokens', name, [megabytes], 'MB',
                           **common))
  return rows


def main(quick: bool) -> list[dict[str, Any]]:
  d, f = (16, 32) if quick else (768, 3072)
  return [row for case in (SMALL if quick else CASES) for row in case_rows(*case, d, f)]


if __name__ == '__main__':
  timing.run(main)
