"""Worker: forward pass of a Switch-base-8 in float32, 2 x 512 encoder and decoder tokens."""

import jax

from experiments.bench import timing
from moejax import model, presets


def main() -> None:
  config = presets.preset('switch-base-8')
  params = jax.jit(lambda key: model.init_params(config, key))(jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (2, 512), 2, config.vocab_size)
  forward = jax.jit(
      lambda params, x, y: model.apply_fn(config, params, x, y).logits_btv
  )
  fn = lambda: jax.block_until_ready(forward(params, tokens, tokens))
  timing.emit([{
      'bench': 'switch-base-8 forward', 'implementation': f'moejax, jax {jax.__version__}',
      **timing.median_ms(fn),
  }])


if __name__ == '__main__':
  main()
