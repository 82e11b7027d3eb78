"""Every setting of a model and a run as frozen, validated dataclasses; see also `settings`."""

from moejax.config.activation import ACTIVATIONS, Act, Activation, CutsConfig
from moejax.config.decoder import DecoderConfig, DecoderMoeConfig, RopeConfig, StackConfig
from moejax.config.encdec import EncDecConfig, EncDecMoeConfig
from moejax.config.encoder import EncoderConfig
from moejax.config.moe import BALANCES, ROUTERS, VARIANTS, MoeConfig
from moejax.config.run import (
  ActivityConfig,
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
  'Act',
  'Activation',
  'ActivityConfig',
  'CutsConfig',
  'DataConfig',
  'DecoderConfig',
  'DecoderMoeConfig',
  'DistillConfig',
  'EncDecConfig',
  'EncDecMoeConfig',
  'EncoderConfig',
  'Experiment',
  'LowRankConfig',
  'MeshConfig',
  'ModelConfig',
  'MoeConfig',
  'OptimConfig',
  'RopeConfig',
  'StackConfig',
  'TrainConfig',
  'apply_overrides',
  'from_json',
  'model_from_json',
  'to_json',
]
