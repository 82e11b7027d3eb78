"""Every setting of a model and a run as frozen, validated dataclasses; see also `settings`."""

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar

from moejax.errors import UserError, did_you_mean
from moejax.settings import Checked, apply_overrides, from_json, to_json

__all__ = [
    'ACTIVATIONS', 'FAMILIES', 'DataConfig', 'Experiment', 'MeshConfig', 'ModelConfig', 'MoeConfig',
    'OptimConfig', 'TrainConfig', 'apply_overrides', 'from_json', 'to_json',
]

ACTIVATIONS = ('relu', 'gelu', 'gelu_new', 'silu')
FAMILIES = ('switch', 't5')


def _require(condition: bool, field: str, value: Any, rule: str) -> None:
  if not condition:
    raise UserError(f'{field} = {value!r}: {rule}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig(Checked):
  """Sparse layers of a Switch Transformer (arXiv 2101.03961).

  A sparse step of n makes layer i sparse when i % n == 1; 1 makes every layer sparse, 0 none.
  `expert_capacity` counts tokens an expert takes from one sequence; None drops no token. With
  `router_ignore_padding_tokens` padding goes to no expert and counts in no loss.
  """

  section: ClassVar[str] = 'moe.'
  least: ClassVar[Mapping[str, float]] = {
      'num_experts': 1, 'encoder_sparse_step': 0, 'decoder_sparse_step': 0, 'expert_capacity': 1,
      'router_z_loss_coef': 0, 'router_aux_loss_coef': 0,
  }
  num_experts: int
  encoder_sparse_step: int = 2
  decoder_sparse_step: int = 2
  router_bias: bool = False
  router_jitter_noise: float = 0.01
  expert_capacity: int | None = None
  router_z_loss_coef: float = 0.001
  router_aux_loss_coef: float = 0.001
  router_ignore_padding_tokens: bool = False

  def __post_init__(self):
    super().__post_init__()
    _require(
        0.0 <= self.router_jitter_noise < 1.0,
        'moe.router_jitter_noise', self.router_jitter_noise, 'in [0, 1)',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
  """One encoder-decoder: Switch Transformer, T5 v1.0 (ReLU) or T5 v1.1 (gated GELU)."""

  section: ClassVar[str] = 'model.'
  least: ClassVar[Mapping[str, float]] = {
      'vocab_size': 1, 'd_model': 1, 'd_kv': 1, 'd_ff': 1, 'num_heads': 1, 'num_layers': 1,
      'num_decoder_layers': 1, 'norm_eps': 0, 'relative_attention_max_distance': 1,
      'initializer_factor': 0, 'pad_id': 0, 'eos_id': 0, 'decoder_start_id': 0,
  }
  family: str = 'switch'
  vocab_size: int
  d_model: int
  d_kv: int
  d_ff: int
  num_heads: int
  num_layers: int
  num_decoder_layers: int
  activation: str = 'relu'
  gated: bool = False
  tie_embeddings: bool = True
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  norm_eps: float = 1e-6
  dropout_rate: float = 0.1
  initializer_factor: float = 1.0
  pad_id: int = 0
  eos_id: int = 1
  decoder_start_id: int = 0
  moe: MoeConfig | None = None

  def __post_init__(self):
    super().__post_init__()
    if self.family not in FAMILIES:
      raise UserError(
          f'model.family = {self.family!r}: one of {FAMILIES}{did_you_mean(self.family, FAMILIES)}'
      )
    if self.activation not in ACTIVATIONS:
      raise UserError(
          f'model.activation = {self.activation!r}: one of {ACTIVATIONS}'
          f'{did_you_mean(self.activation, ACTIVATIONS)}'
      )
    _require(
        self.relative_attention_num_buckets >= 4 and self.relative_attention_num_buckets % 2 == 0,
        'model.relative_attention_num_buckets', self.relative_attention_num_buckets,
        'an even number, at least 4',
    )
    for name in ('pad_id', 'eos_id', 'decoder_start_id'):
      _require(
          getattr(self, name) < self.vocab_size, f'model.{name}', getattr(self, name),
          f'under model.vocab_size = {self.vocab_size}',
      )
    _require(
        0.0 <= self.dropout_rate < 1.0, 'model.dropout_rate', self.dropout_rate, 'in [0, 1)'
    )
    _require(
        self.family == 'switch' or self.moe is None, 'model.moe', self.moe,
        "must be null for family 't5'",
    )

  def sparse_layers(self, stack: str) -> tuple[int, ...]:
    """Indices of the sparse layers of 'encoder' or 'decoder'."""
    layers = self.num_layers if stack == 'encoder' else self.num_decoder_layers
    if self.moe is None:
      return ()
    step = self.moe.encoder_sparse_step if stack == 'encoder' else self.moe.decoder_sparse_step
    if step == 0:
      return ()
    return tuple(i for i in range(layers) if step == 1 or i % step == 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
  """Text to span-corrupted samples (T5, arXiv 1910.10683, 3.1.4). Lengths are in tokens.

  Files are paths, globs or 'archive.tgz::glob'; an empty `tokenizer` trains one on train_files.
  """

  section: ClassVar[str] = 'data.'
  least: ClassVar[Mapping[str, float]] = {'num_sentinels': 0, 'encoder_length': 3, 'seed': 0}
  train_files: tuple[str, ...] = ()
  valid_files: tuple[str, ...] = ()
  tokenizer: str = ''
  num_sentinels: int = 100
  encoder_length: int = 512
  noise_density: float = 0.15
  mean_span: float = 3.0
  seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig(Checked):
  """An optax chain: clip, optimizer, schedule, weight decay and rates by path rules.

  Schedules after the warm-up: 'constant', 'cosine', 'linear', 'rsqrt' (T5's), and 'wsd', constant
  and then linear over the last `decay_steps`. `scale_by_param_rms` makes rates relative to each
  parameter's size, as Adafactor does (arXiv 1804.04235, section 8). Rules are (path regex, factor),
  first match wins.
  """

  section: ClassVar[str] = 'optim.'
  least: ClassVar[Mapping[str, float]] = {
      'learning_rate': 0, 'warmup_steps': 0, 'decay_steps': 0, 'weight_decay': 0, 'clip_norm': 0,
  }
  optimizer: str = 'adamw'
  learning_rate: float = 1e-3
  schedule: str = 'cosine'
  warmup_steps: int = 1000
  decay_steps: int = 0
  end_fraction: float = 0.1
  b1: float = 0.9
  b2: float = 0.98
  eps: float = 1e-8
  weight_decay: float = 0.01
  clip_norm: float = 1.0
  scale_by_param_rms: bool = False
  weight_decay_rules: tuple[tuple[str, float], ...] = (
      (r'.*(norm|final_norm|relative_bias|bias)', 0.0),
      (r'.*', 1.0),
  )
  learning_rate_rules: tuple[tuple[str, float], ...] = ((r'.*', 1.0),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Checked):
  """Devices along each mesh axis; a `data` of -1 takes all that are left."""

  section: ClassVar[str] = 'mesh.'
  least: ClassVar[Mapping[str, float]] = {'data': -1, 'expert': 1, 'tensor': 1}
  data: int = -1
  expert: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
  """The training loop. Intervals are in optimizer steps; an interval of 0 means never.

  `max_seconds` over 0 ends a run early, with a checkpoint. `aligned_start`: see `nn.aligned`.
  `peak_flops_per_second` of 0 is measured by a matmul at the start; it is what utilisation is a
  share of.
  """

  section: ClassVar[str] = 'train.'
  least: ClassVar[Mapping[str, float]] = {
      'steps': 1, 'batch_size': 1, 'accumulate': 1, 'seed': 0, 'log_every': 0, 'eval_every': 0,
      'eval_batches': 0, 'checkpoint_every': 0, 'keep_checkpoints': 1, 'max_seconds': 0,
      'peak_flops_per_second': 0,
  }
  steps: int = 1000
  batch_size: int = 32
  accumulate: int = 1
  compute_dtype: str = 'float32'
  remat: bool = False
  seed: int = 0
  log_every: int = 20
  eval_every: int = 200
  eval_batches: int = 16
  checkpoint_every: int = 200
  keep_checkpoints: int = 2
  max_seconds: float = 0.0
  aligned_start: bool = False
  save_dtype: str = 'float32'
  peak_flops_per_second: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(Checked):
  """Everything a run needs; one file in configs/ returns one of these."""

  model: ModelConfig
  data: DataConfig = DataConfig()
  optim: OptimConfig = OptimConfig()
  mesh: MeshConfig = MeshConfig()
  train: TrainConfig = TrainConfig()
  init_from: str = ''
