"""Settings of a run: data, optimizer, mesh, training loop, and the experiment that holds them."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any, ClassVar

from moejax.config.decoder import StackConfig
from moejax.config.encdec import EncDecConfig
from moejax.config.moe import require, require_known, require_pattern
from moejax.settings import Checked, from_json

ModelConfig = EncDecConfig | StackConfig


def model_from_json(values: Mapping[str, Any]) -> ModelConfig:
  """The config of a model from JSON values, by their 'family'; anything wrong raises UserError."""
  return from_json(ModelConfig, values)  # type: ignore[arg-type,var-annotated]


def require_weights(weights: Sequence[float], sources: int, field: str) -> None:
  """Raises UserError unless there is one weight a source, none negative, and one above 0."""
  require(
      len(weights) == sources, field, tuple(weights),
      f'{len(weights)} for {sources} sources: give one for each',
  )
  require(
      all(math.isfinite(w) and w >= 0 for w in weights), field, tuple(weights),
      'each a finite number, at least 0',
  )
  require(any(w > 0 for w in weights), field, tuple(weights), 'at least one above 0')


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
  """From text to samples. Lengths are in tokens.

  train_files, valid_files: paths, folders, globs or 'archive.tgz::glob'. train_weights: the share
    of the training rows that each entry of train_files gives, relative to the others; empty for
    all texts in one, each as often as the others. An empty `tokenizer` trains one on train_files.
  num_sentinels, encoder_length, noise_density, mean_span: span-corrupted samples of
    encoder-decoders (T5, arXiv 1910.10683, 3.1.4). sequence_length: packed rows of decoders.
  """

  section: ClassVar[str] = 'data.'
  least: ClassVar[Mapping[str, float]] = {
      'num_sentinels': 0, 'encoder_length': 3, 'sequence_length': 2, 'seed': 0,
  }
  train_files: tuple[str, ...] = ()
  train_weights: tuple[float, ...] = ()
  valid_files: tuple[str, ...] = ()
  tokenizer: str = ''
  num_sentinels: int = 100
  encoder_length: int = 512
  noise_density: float = 0.15
  mean_span: float = 3.0
  sequence_length: int = 512
  seed: int = 0

  def __post_init__(self):
    super().__post_init__()
    if self.train_weights:
      require_weights(self.train_weights, len(self.train_files), 'data.train_weights')


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig(Checked):
  """An optax chain: clip, optimizer, schedule, weight decay and rates by path rules.

  Schedules after the warm-up: 'constant', 'cosine', 'linear', 'rsqrt' (T5's), and 'wsd', constant
  and then linear over the last `decay_steps`. `scale_by_param_rms` makes rates relative to each
  parameter's size, as 'adafactor' always does (arXiv 1804.04235, section 8). Rules are (path regex,
  factor), first match wins.
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
  """Devices along each mesh axis; a `data` of -1 takes all that are left.

  Batches, parameters and optimizer are split over data, experts over expert (the batch too),
  heads and hidden units over tensor, layers over pipeline.
  """

  section: ClassVar[str] = 'mesh.'
  least: ClassVar[Mapping[str, float]] = {'data': -1, 'expert': 1, 'tensor': 1, 'pipeline': 1}
  data: int = -1
  expert: int = 1
  tensor: int = 1
  pipeline: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
  """The training loop. Intervals are in optimizer steps; an interval of 0 means never.

  `max_seconds` over 0 ends a run early, with a checkpoint. `aligned_start`: see `nn.aligned`.
  `peak_flops_per_second` of 0 is measured by a matmul at the start; it is what utilisation is a
  share of. `scan_layers`: layers that are alike are stacked and run by one program, which
  compiles once for all of them; a decoder's mesh with a pipeline needs it, and splits each batch
  into `pipeline_microbatches` (0: as many as stages). A step whose numbers are not finite, or whose
  loss is over the median of the last steps by `spike_nats` (0: any loss will do), ends the run
  before a checkpoint holds it; `on_spike` 'skip' leaves the step out instead. `members` over 1
  trains an ensemble of experts (`nn.members`): each row is learned by every member.
  """

  section: ClassVar[str] = 'train.'
  least: ClassVar[Mapping[str, float]] = {
      'steps': 1, 'batch_size': 1, 'accumulate': 1, 'seed': 0, 'log_every': 0, 'eval_every': 0,
      'eval_batches': 0, 'checkpoint_every': 0, 'keep_checkpoints': 1, 'max_seconds': 0,
      'peak_flops_per_second': 0, 'pipeline_microbatches': 0,
      'spike_nats': 0, 'members': 1,
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
  scan_layers: bool = False
  pipeline_microbatches: int = 0
  on_spike: str = 'stop'
  spike_nats: float = 2.0
  members: int = 1
  aligned_start: bool = False
  save_dtype: str = 'float32'
  peak_flops_per_second: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(Checked):
  """Learning from a teacher: task_weight * cross-entropy + weight * `train.distill.logit_loss`.

  hidden_weight: of `train.distill.hidden_loss` beside these, over all layers of each stack, in
  hidden_form, 'mse', 'cosine' or 'layers'; MC-SMoE's code has 0.01 and its recipes 0. Padding
  counts in it.
  teacher: its model folder; empty for none. temperature, reduction, symmetric: see there; MC-SMoE
  (arXiv 2310.01334) has weight 0.2, temperature 2, reduction 'published'. deterministic: the
  student learns without dropout, noise and sampling, as published; the teacher never has any.
  """

  section: ClassVar[str] = 'distill.'
  least: ClassVar[Mapping[str, float]] = {'weight': 0, 'task_weight': 0, 'hidden_weight': 0}
  teacher: str = ''
  weight: float = 0.2
  task_weight: float = 1.0
  temperature: float = 2.0
  reduction: str = 'token'
  symmetric: bool = False
  hidden_weight: float = 0.0
  hidden_form: str = 'mse'
  deterministic: bool = True

  def __post_init__(self):
    super().__post_init__()
    require(self.temperature > 0, 'distill.temperature', self.temperature, 'above 0')
    require_known(self.reduction, 'distill.reduction', ('token', 'published'))
    require_known(self.hidden_form, 'distill.hidden_form', ('mse', 'cosine', 'layers'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivityConfig(Checked):
  """A loss on the activity of dense FFNs beside the others, a mean over them (`train.activity`).

  form: 'l1', the mean size of hidden units; 'hoyer', the square-Hoyer index over their number;
  'above', for smooth activations, how far their inputs are over -10 (D2DMoE, arXiv 2310.04361);
  empty for none. weights, stages: of its stages, and their lengths in steps; see
  `train.activity.weight`. One weight without stages holds for the whole run.
  """

  section: ClassVar[str] = 'activity.'
  form: str = ''
  weights: tuple[float, ...] = (0.1,)
  stages: tuple[int, ...] = ()

  def __post_init__(self):
    super().__post_init__()
    require_known(self.form, 'activity.form', ('', 'l1', 'hoyer', 'above'))
    require(
        bool(self.weights) and min(self.weights) >= 0, 'activity.weights', self.weights,
        'one or more, none below 0',
    )
    require(
        len(self.stages) == len(self.weights) or (len(self.weights) == 1 and not self.stages),
        'activity.stages', self.stages, f'one for each of {len(self.weights)} weights',
    )
    require(all(n >= 1 for n in self.stages), 'activity.stages', self.stages, 'each at least 1')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankConfig(Checked):
  """Matrices that are trained as left right + rest (`train.low_rank`).

  matrices: a regex of their paths; empty for none. rank: of left right. start: 'svd', the largest
  singular values (LoSparse, arXiv 2306.11222), or 'zeros', nothing, on top of the matrix (LoRA,
  2106.09685), which then counts alpha / rank (alpha of 0: 1) and whose rest
  `optim.learning_rate_rules` may keep fixed. kept: the share of the rest's weights that is left at
  the end; under 1 it is pruned as `train.sparsify.Pruning` says, with T_i = warmup_steps and
  T_f = settle_steps, and the model that is saved holds kept outputs only.
  """

  section: ClassVar[str] = 'low_rank.'
  least: ClassVar[Mapping[str, float]] = {
      'rank': 1, 'alpha': 0, 'warmup_steps': 0, 'settle_steps': 0, 'every': 1,
  }
  matrices: str = ''
  rank: int = 32
  start: str = 'svd'
  alpha: float = 0.0
  kept: float = 1.0
  warmup_steps: int = 50
  settle_steps: int = 200
  every: int = 1
  uncertainty: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    require_pattern(self.matrices, 'low_rank.matrices')
    require(0 < self.kept <= 1, 'low_rank.kept', self.kept, 'a share above 0, at most 1')
    require(0 < self.uncertainty <= 1, 'low_rank.uncertainty', self.uncertainty, 'in (0, 1]')
    require_known(self.start, 'low_rank.start', ('svd', 'zeros'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(Checked):
  """Everything a run needs; one file in configs/ returns one of these."""

  model: ModelConfig
  data: DataConfig = DataConfig()
  optim: OptimConfig = OptimConfig()
  mesh: MeshConfig = MeshConfig()
  train: TrainConfig = TrainConfig()
  distill: DistillConfig = DistillConfig()
  low_rank: LowRankConfig = LowRankConfig()
  activity: ActivityConfig = ActivityConfig()
  init_from: str = ''
