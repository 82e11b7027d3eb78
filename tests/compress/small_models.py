"""Tiny random models of every router and form of dense FFN, with calibration batches."""

import jax
import numpy as np

from moejax import tree
from moejax.config import (
  DecoderConfig,
  DecoderMoeConfig,
  EncDecConfig,
  EncDecMoeConfig,
  EncoderConfig,
  ModelConfig,
)
from moejax.model import Model, init_params

EXPERTS = 6
BASE = dict(
    vocab_size=61, d_model=16, d_head=8, d_ff=24, num_heads=2, num_kv_heads=2, num_layers=2,
    initializer_std=0.3, eos_ids=(1,),
)
CONFIGS = {
    'switch': EncDecConfig(
        vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=2,
        num_decoder_layers=2, dropout_rate=0.0, moe=EncDecMoeConfig(
            num_experts=EXPERTS, router_jitter_noise=0.0, encoder_sparse_step=2,
            decoder_sparse_step=1, expert_capacity=64,
        ),
    ),
    'grin': DecoderConfig(
        family='grin', norm='layer', moe=DecoderMoeConfig(num_experts=EXPERTS, jitter_eps=0.3),
        **BASE,
    ),
    'mixtral': DecoderConfig(
        family='mixtral', moe=DecoderMoeConfig(
            num_experts=EXPERTS, top_k=2, router='topk', normalize_gates=True
        ), **BASE,
    ),
    'olmoe': DecoderConfig(
        family='olmoe', qk_norm='full', moe=DecoderMoeConfig(
            num_experts=EXPERTS, top_k=3, router='topk'
        ), **BASE,
    ),
    'qwen2_moe': DecoderConfig(
        family='qwen2_moe', moe=DecoderMoeConfig(
            num_experts=EXPERTS, top_k=2, router='topk', d_ff=20, shared_d_ff=24, shared_gate=True,
        ), **BASE,
    ),
}


DENSE_BASE = dict(max_positions=64, **BASE)
ENCDEC = dict(
    family='t5', vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=2,
    num_decoder_layers=2, dropout_rate=0.0,
)
DENSE = {
    't5': EncDecConfig(**ENCDEC),
    't5_gated': EncDecConfig(
        activation='gelu_new', gated=True, tie_embeddings=False, **ENCDEC
    ),
    'opt': DecoderConfig(
        family='opt', activation='relu', gated=False, norm='layer', rope=None, ffn_bias=True,
        attention_bias=True, attention_out_bias=True, position_offset=2, tie_embeddings=True,
        **DENSE_BASE,
    ),
    'llama': DecoderConfig(family='llama', **DENSE_BASE),
    'llama_biased': DecoderConfig(family='llama', ffn_bias=True, **DENSE_BASE),
    'bert': EncoderConfig(
        activation='relu', dropout_rate=0.0, **{**DENSE_BASE, 'eos_ids': ()},
    ),
}


def config_of(family: str) -> ModelConfig:
  return {**CONFIGS, **DENSE}[family]


def has_encoder(family: str) -> bool:
  return isinstance(config_of(family), EncDecConfig)


def model(family: str, seed: int = 0) -> Model:
  """The biases of dense FFNs are not 0."""
  config = config_of(family)
  flat = tree.flatten(init_params(config, jax.random.key(seed)))
  rng = np.random.default_rng(seed)
  for path, leaf in flat.items():
    if family in DENSE and path.endswith('_bias') and '/ffn/' in path:
      flat[path] = jax.numpy.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype)
  return Model(config, tree.unflatten(flat))


def batches(family: str, count: int = 2, seed: int = 0) -> list[dict[str, np.ndarray]]:
  rng = np.random.default_rng(seed)
  draw = lambda: rng.integers(2, 61, (4, 24)).astype(np.int32)
  if not has_encoder(family):
    return [{'tokens': draw()} for _ in range(count)]
  made = []
  for _ in range(count):
    targets = draw()[:, :12]
    encoder = draw()
    encoder[1, 15:] = 0
    made.append({
        'encoder_tokens': encoder, 'targets': targets,
        'decoder_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1].astype(np.int32),
        'weights': np.ones(targets.shape, np.float32),
    })
  return made


def logits(made: Model, family: str) -> np.ndarray:
  batch = batches(family, 1, 7)[0]
  if has_encoder(family):
    tokens = batch['encoder_tokens']
    return np.asarray(made.apply(
        tokens, batch['decoder_tokens'], encoder_mask=tokens != 0
    ).logits_btv)
  return np.asarray(made.apply(batch['tokens']).logits_btv)


def loss(made: Model, family: str, batch: dict[str, np.ndarray]) -> float:
  """Mean cross-entropy of a batch through the whole model."""
  if has_encoder(family):
    tokens = batch['encoder_tokens']
    out = made.apply(tokens, batch['decoder_tokens'], encoder_mask=tokens != 0).logits_btv
    targets, weights = batch['targets'], batch['weights']
  else:
    out, causal = made.apply(batch['tokens']).logits_btv, made.config.causal
    targets = np.roll(batch['tokens'], -1, 1) if causal else batch['tokens']
    length = targets.shape[1]
    weights = np.ones(targets.shape) * (np.arange(length) < (length - 1 if causal else length))
  own = np.take_along_axis(np.asarray(jax.nn.log_softmax(out)), targets[..., None], -1)[..., 0]
  return float(-(own * weights).sum() / weights.sum())


def duplicated(family: str, seed: int = 0) -> Model:
  """A model whose experts are copies of two, hidden units in any order: i and i + 3 alike."""
  made = model(family, seed)
  rng = np.random.default_rng(seed)
  flat = {k: np.array(v) for k, v in tree.flatten(made.params).items()}
  for path in [p for p in flat if p.endswith('experts/wi')]:
    layer = path.rpartition('/')[0]
    for e in range(3, EXPERTS):
      order = rng.permutation(flat[path].shape[2])
      for name in ('wi', 'gate', 'wo'):
        if f'{layer}/{name}' in flat:
          w = flat[f'{layer}/{name}']
          w[e] = w[e - 3][order] if name == 'wo' else w[e - 3][:, order]
  return Model(made.config, tree.unflatten(flat))
