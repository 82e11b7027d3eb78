"""Every setting of a model and a run as frozen, validated dataclasses; see also `settings`."""

from moejax.config.decoder import DecoderConfig, DecoderMoeConfig, RopeConfig
from moejax.config.encdec import ACTIVATIONS, EncDecConfig, EncDecMoeConfig
from moejax.config.moe import BALANCES, ROUTERS, VARIANTS, MoeConfig
from moejax.config.run import (
  DataConfig,
  DistillConfig,
  Experiment,
  LowRankConfig,
  MeshConfig,
  ModelConfig,
  OptimConfig,
  TrainConfig,
  model_from_json,
)
from moejax.settings import apply_overrides, from_json, to_json

__all__ = [
  'ACTIVATIONS',
  'BALANCES',
  'ROUTERS',
  'VARIANTS',
  'DataConfig',
  'DecoderConfig',
  'DecoderMoeConfig',
  'DistillConfig',
  'EncDecConfig',
  'EncDecMoeConfig',
  'Experiment',
  'LowRankConfig',
  'MeshConfig',
  'ModelConfig',
  'MoeConfig',
  'OptimConfig',
  'RopeConfig',
  'TrainConfig',
  'apply_overrides',
  'from_json',
  'model_from_json',
  'to_json',
]
