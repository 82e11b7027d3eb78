"""Tiny random dense models of every form of feed-forward block, with calibration batches."""

import jax
import numpy as np

from moejax import tree
from moejax.config import DecoderConfig, EncDecConfig
from moejax.model import Model, init_params

BASE = dict(
    vocab_size=61, d_model=16, d_head=8, d_ff=24, num_heads=2, num_kv_heads=2, num_layers=2,
    initializer_std=0.3, eos_ids=(1,), max_positions=64,
)
ENCDEC = dict(
    family='t5', vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=2,
    num_decoder_layers=2, dropout_rate=0.0,
)
CONFIGS = {
    't5': EncDecConfig(**ENCDEC),
    't5_gated': EncDecConfig(
        activation='gelu_new', gated=True, tie_embeddings=False, **ENCDEC
    ),
    'opt': DecoderConfig(
        family='opt', activation='relu', gated=False, norm='layer', rope=None, ffn_bias=True,
        attention_bias=True, attention_out_bias=True, position_offset=2, tie_embeddings=True,
        **BASE,
    ),
    'llama': DecoderConfig(family='llama', **BASE),
    'llama_biased': DecoderConfig(family='llama', ffn_bias=True, **BASE),
}


def model(family: str, seed: int = 0) -> Model:
  """With biases that are not 0."""
  config = CONFIGS[family]
  flat = tree.flatten(init_params(config, jax.random.key(seed)))
  rng = np.random.default_rng(seed)
  for path, leaf in flat.items():
    if path.endswith('_bias') and '/ffn/' in path:
      flat[path] = jax.numpy.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype)
  return Model(config, tree.unflatten(flat))


def batches(family: str, count: int = 4, seed: int = 0) -> list[dict[str, np.ndarray]]:
  rng = np.random.default_rng(seed)
  draw = lambda: rng.integers(2, 61, (4, 24)).astype(np.int32)
  if not family.startswith('t5'):
    return [{'tokens': draw()} for _ in range(count)]
  made = []
  for _ in range(count):
    targets, encoder = draw()[:, :12], draw()
    encoder[1, 15:] = 0
    made.append({
        'encoder_tokens': encoder, 'targets': targets,
        'decoder_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1].astype(np.int32),
        'weights': np.ones(targets.shape, np.float32),
    })
  return made


def logits(made: Model, family: str) -> np.ndarray:
  batch = batches(family, 1, 7)[0]
  if not family.startswith('t5'):
    return np.asarray(made.apply(batch['tokens']).logits_btv)
  tokens = batch['encoder_tokens']
  return np.asarray(
      made.apply(tokens, batch['decoder_tokens'], encoder_mask=tokens != 0).logits_btv
  )


def loss(made: Model, family: str, batch: dict[str, np.ndarray]) -> float:
  """Mean cross-entropy of a batch through the whole model."""
  if family.startswith('t5'):
    tokens = batch['encoder_tokens']
    out = made.apply(tokens, batch['decoder_tokens'], encoder_mask=tokens != 0).logits_btv
    targets, weights = batch['targets'], batch['weights']
  else:
    out, targets = made.apply(batch['tokens']).logits_btv, np.roll(batch['tokens'], -1, 1)
    weights = np.ones(targets.shape) * (np.arange(targets.shape[1]) < targets.shape[1] - 1)
  own = np.take_along_axis(np.asarray(jax.nn.log_softmax(out)), targets[..., None], -1)[..., 0]
  return float(-(own * weights).sum() / weights.sum())
